// The charts of a training client with their tools: smoothing, logarithm, axis, zoom, and the numbers as a table.
import { settle } from "./wire.js";
import { fill, make, makeButton, makeSelect, numberText, scrollable } from "./page.js";
import { Chart, Lens } from "./chart.js";
import { downloadButton } from "./download.js";

const MOST_ROWS = 100;
const DASHES = [[], [7, 3], [2, 2], [9, 3, 2, 3], [4, 4], [12, 4]];

// What is drawn: one large chart of the curve to watch, several runs on it where there are several, and small ones.
function specs(curve, labels, whole) {
  const held = { dash: [6, 4], dots: true, smooth: false };
  if (labels.length > 1) {
    const lines = labels.map((label, i) => ({
      name: `${i ? `${i}:` : ""}${curve}`, label, colour: i, dash: DASHES[i], smooth: true,
    }));
    return [{ title: curve, lines, log: true, marks: true, breaks: true }];
  }
  const main = {
    lines: [{ name: curve, smooth: true }, { name: `eval/${curve}`, colour: 1, ...held }], log: true, marks: true, breaks: curve === "reward",
  };
  const small = (title, ...lines) => ({ title, small: true, marks: false, lines: lines.map((line) => ({ smooth: true, ...line })) });
  const share = (chart) => ({ ...chart, range: [-0.02, 1.02] });
  const idle = (chart) => ({ ...chart, idle: true }); // out of sight as long as it is zero: nothing of the kind goes on
  if (curve !== "reward") {
    const pairs = [
      share(small("pairs in the right order", { name: "accuracy", label: "share" }, { name: "eval/accuracy", label: "held out", colour: 1, ...held })),
      small("reward margin", { name: "reward_margin", label: "margin" }, { name: "eval/reward_margin", label: "held out", colour: 1, ...held }),
    ];
    return whole ? [main, ...pairs, small("gradient norm", { name: "grad_norm", label: "" }), small("tokens/s", { name: "tokens/s", label: "", colour: 2 })] : [main];
  }
  main.band = "group/reward_std";
  main.lines.push({ name: "rewards/true", label: "true reward", colour: 2, dash: [2, 2] }, { name: "resample/reward", label: "all sampled", colour: 3, dash: [9, 3] });
  if (!whole) return [main];
  return [
    main,
    share(small("groups of answers", { name: "by_group/frac_all_good", label: "all right", colour: 2 }, { name: "by_group/frac_mixed", label: "mixed", colour: 0, dash: [6, 3] }, { name: "by_group/frac_all_bad", label: "all wrong", colour: 1, dash: [2, 2] })),
    idle(small("prompts thrown away", { name: "resample/groups", label: "per step", colour: 1 })),
    small("length of answers", { name: "completions/mean_length", label: "tokens" }),
    idle(share(small("answers cut off", { name: "completions/clipped_ratio", label: "share", colour: 1 }))),
    small("entropy", { name: "entropy", label: "", colour: 3 }),
    idle(small("policy KL", { name: "policy/approx_kl", label: "", colour: 4, dots: true })),
    { ...small("size of gradient and update", { name: "grad_norm", label: "gradient" }, { name: "param_delta_norm", label: "weights", colour: 1, dash: [6, 3] }), log: "always" },
  ];
}

// Whether a series has something to show; one that may be idle does not before it leaves zero.
function hasNews(series, idle = false) {
  if (!idle || !series.n) return series.n > 0;
  while (series.left < series.n && series.values[series.left] === 0) series.left++;
  return series.left < series.n;
}

// Which points a table of at most `most` rows shows, of those in the window.
function rowsOf(steps, xs, n, lens, most = MOST_ROWS) {
  const inside = [];
  for (let i = 0; i < n; i++) if (lens.from === null || (xs[i] >= lens.from && xs[i] <= lens.to)) inside.push(i);
  const every = Math.ceil(inside.length / most) || 1;
  return inside.filter((_, k) => (inside.length - 1 - k) % every === 0);
}

class Curves {
  constructor(store, model, whole) {
    Object.assign(this, { store, model, whole, lens: new Lens(), charts: [], kind: "", tabled: false });
    this.el = make("div", "tsnb-curves");
    this.tools = make("div", "tsnb-tools");
    this.grid = make("div", "tsnb-grid-of-charts");
    this.table = make("div", "tsnb-scroll");
    scrollable(this.table, "the curves as a table");
    this.el.append(this.tools, this.grid, this.table);
    this.buildTools();
    this.lens.listeners.add(() => this.showWindow());
  }

  buildTools() {
    const { model } = this;
    this.slider = make("input");
    Object.assign(this.slider, { type: "range", min: 0, max: 0.99, step: 0.01 });
    this.slider.addEventListener("input", () => settle(model, "smoothing", Number(this.slider.value)));
    this.log = make("input");
    this.log.type = "checkbox";
    this.log.addEventListener("change", () => settle(model, "log_scale", this.log.checked));
    const labelled = (text, ...controls) => {
      const label = make("label", "", text);
      label.append(...controls);
      return label;
    };
    this.weight = make("output");
    this.axis = makeSelect("horizontal axis", ["step", "tokens", "time"].map((name) => [name, `over ${name}`]), model.get("x_axis"), (name) => {
      this.lens.set({ from: null, to: null });
      settle(model, "x_axis", name);
    });
    this.reset = makeButton("Reset zoom", () => this.lens.set({ from: null, to: null }));
    this.toggle = makeButton("Table view", () => {
      this.tabled = !this.tabled;
      this.update();
    });
    this.operator = make("span", "tsnb-operator", "operator view, not covered by ε");
    this.operator.title = "Curves are computed from the training data itself; the privacy guarantee is about the weights.";
    this.tools.append(labelled("smoothing ", this.slider, this.weight), labelled("", this.log, " log"), this.axis, this.reset, this.toggle, downloadButton(this.store, model, (text) => this.onSpeak?.(text)), this.operator);
  }

  get name() {
    return this.store.status.curve || "loss";
  }

  get main() {
    return this.charts[0].main;
  }

  update() {
    const { store, model } = this;
    const kind = `${this.name} ${model.get("labels") ?? ""}`;
    if (kind !== this.kind) this.rebuild(kind);
    this.slider.value = store.smoothing;
    fill(this.weight, store.smoothing.toFixed(2));
    this.log.checked = model.get("log_scale");
    this.axis.value = model.get("x_axis");
    this.operator.hidden = !store.status.dp;
    this.showWindow();
    this.grid.hidden = this.tabled;
    this.table.hidden = !this.tabled;
    fill(this.toggle, this.tabled ? "Chart view" : "Table view");
    for (const option of this.axis.options) option.hidden = option.value !== "step" && !store.get(`~${option.value}`).n;
    if (this.tabled) this.showTable();
    let small = 0;
    for (const chart of this.charts) {
      const shown = chart.spec.lines.some((line) => hasNews(store.get(line.name), chart.spec.idle));
      chart.el.classList.toggle("tsnb-bare", !shown);
      small += shown && chart.spec.small ? 1 : 0;
      chart.schedule();
    }
    this.grid.style.setProperty("--tsnb-columns", small > 2 && small !== 4 ? 3 : 2);
  }

  showWindow() {
    if (this.lens.from === null && document.activeElement === this.reset) this.charts[0].plot.focus();
    this.reset.hidden = this.lens.from === null || this.tabled;
  }

  rebuild(kind) {
    this.kind = kind;
    for (const chart of this.charts) chart.destroy();
    this.charts = specs(this.name, this.model.get("labels") ?? [], this.whole).map((spec) => new Chart(this.store, this.model, this.lens, spec));
    for (const chart of this.charts) Object.assign(chart, { over: this.charts[0], onSpeak: this.onSpeak, onChoose: this.onChoose });
    this.grid.replaceChildren(...this.charts.map((chart) => chart.el));
  }

  showTable() {
    const { main } = this;
    const lines = this.charts.flatMap((chart) => chart.spec.lines.map((line) => [line.name, this.store.get(line.name).current])).filter(([, series]) => series.n);
    const shown = rowsOf(main.steps, this.charts[0].xsOf(main, this.charts[0].spec.lines[0]), main.n, this.lens);
    const at = lines.map(([, series]) => new Map(shown.length ? Array.from(series.steps.subarray(0, series.n), (step, i) => [step, series.values[i]]) : []));
    const table = make("table");
    const row = (tag, cells) => {
      const tr = make("tr");
      for (const [i, text] of cells.entries()) {
        const cell = make(i && tag === "td" ? "td" : "th", "tsnb-number", text);
        if (cell.tagName === "TH") cell.scope = tag === "th" ? "col" : "row";
        tr.append(cell);
      }
      table.append(tr);
    };
    table.append(make("caption", "", `${shown.length} of ${main.n} points, newest last`));
    row("th", ["step", ...lines.map(([name]) => name)]);
    for (const i of shown) row("td", [String(main.steps[i]), ...at.map((values) => (values.has(main.steps[i]) ? numberText(values.get(main.steps[i])) : "—"))]);
    this.table.replaceChildren(table);
  }

  describe() {
    for (const chart of this.charts) chart.describe();
  }

  destroy() {
    for (const chart of this.charts) chart.destroy();
  }
}

export { Curves, hasNews, rowsOf, specs };
