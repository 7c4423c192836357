// The curves as a file, made of what the page holds.
import { make, makeButton } from "./page.js";

const TITLES = { "~time": "seconds", "~tokens": "tokens_so_far" };

// The curves of a store as CSV: a row for each step, empty where nothing was measured; what a rollback gave up is left out.
function csvOf(store, labels) {
  const columns = [...store.series].map(([name, series]) => [name, series.current]).filter(([, series]) => series.n);
  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const titleOf = (name) => {
    const [, number, own] = /^(?:(\d+):)?(.*)$/s.exec(name);
    const title = TITLES[own] ?? own;
    return labels.length > 1 ? `${labels[number ?? 0]}: ${title}` : title;
  };
  const rows = new Map();
  for (const [i, [, series]] of columns.entries()) {
    for (let k = 0; k < series.n; k++) {
      if (!rows.has(series.steps[k])) rows.set(series.steps[k], new Array(columns.length).fill(""));
      const value = series.values[k];
      rows.get(series.steps[k])[i] = Number.isFinite(value) ? String(Number(value.toPrecision(7))) : { NaN: "nan" }[value] ?? (value > 0 ? "inf" : "-inf");
    }
  }
  const lines = [["step", ...columns.map(([name]) => quoted(titleOf(name)))]];
  for (const step of [...rows.keys()].sort((a, b) => a - b)) lines.push([step, ...rows.get(step)]);
  return lines.map((cells) => `${cells.join(",")}\n`).join("");
}

// The name of the file says what is in it: whose curves, and what must be known before it is passed on.
function fileName(title, status, held) {
  const whose = status.run_id || title.split(" ")[0] || "curves";
  const part = status.n > held ? ".part" : "";
  return `${whose.replace(/[^\w.-]+/g, "-")}${part}${status.dp ? ".operator" : ""}.csv`;
}

function downloadButton(store, model, say) {
  const button = makeButton("Download CSV", () => {
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([csvOf(store, model.get("labels") ?? [])], { type: "text/csv" }));
    link.download = fileName(model.get("title"), store.status, store.points);
    link.click();
    URL.revokeObjectURL(link.href);
    const missing = store.status.n - store.points;
    say(missing > 0 ? `${link.download}: ${missing} points are still on their way from the kernel; run.to_csv(path) has all` : `${link.download} was saved`);
  });
  button.title = "The curves that are shown, to 7 digits. run.to_csv(path) writes every metric in full.";
  return button;
}

export { csvOf, downloadButton, fileName };
