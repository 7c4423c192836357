// The checkpoints as a table, with what can be done with each.
import { make, makeButton, makeSure, plainText, scrollable, sizeText, watchWidth } from "./page.js";

const NUMBERS = ["step", "size"];

function metadataText(meta) {
  const entries = Object.entries(meta ?? {});
  return entries.length ? entries.map(([name, value]) => `${name}: ${value}`).join(", ") : "—";
}

// When a checkpoint was saved: the time, and the day where that was not today.
function savedAt(seconds, today = new Date()) {
  const moment = new Date(seconds * 1000);
  const day = moment.toDateString() === today.toDateString() ? "" : `${moment.toLocaleDateString("sv")} `;
  return `${day}${moment.toLocaleTimeString("sv")}`;
}

class Checkpoints {
  constructor(store) {
    this.store = store;
    this.el = make("div", "tsnb-checkpoints tsnb-scroll");
    scrollable(this.el, "checkpoints");
    watchWidth(this.el, 740);
  }

  get rows() {
    return this.store.parts.rows?.rows ?? [];
  }

  update() {
    const { rows = [], saving = 0 } = this.store.parts.rows ?? {};
    const key = JSON.stringify([rows, saving, this.store.status.steer]);
    if (key === this.key) return;
    this.key = key;
    const table = make("table");
    const head = make("tr");
    const steer = this.store.status.steer && rows.length > 0;
    for (const name of ["step", "saved at", "size", "hash", "sealed with", "metadata", ...(steer ? ["actions"] : [])]) {
      const cell = make("th", NUMBERS.includes(name) ? "tsnb-number" : "", name);
      cell.scope = "col";
      head.append(cell);
    }
    table.append(make("caption", "tsnb-name", rows.length || saving ? "checkpoints" : "no checkpoint yet"));
    if (rows.length || saving) table.append(head);
    if (saving) {
      const cell = make("td", "", `${saving} waiting to be written`);
      cell.colSpan = 7;
      const line = make("tr", "tsnb-waiting");
      line.append(cell);
      table.append(line);
    }
    table.append(...rows.map((row) => this.line(row)));
    const held = this.el.contains(document.activeElement) && document.activeElement; // a reader's place is kept
    const [id, what] = [held && held.closest("tr")?.title, held && held.textContent];
    this.el.replaceChildren(table);
    if (id) [...table.querySelectorAll("tr")].find((tr) => tr.title === id)?.querySelectorAll("button").forEach((button) => button.textContent === what && button.focus());
  }

  line(row) {
    const tr = make("tr");
    const step = make("th", "tsnb-number", String(row.step));
    step.scope = "row";
    const hash = makeButton(row.hash.slice(0, 12), (button) => this.copy(button, row), `${row.hash}: a click copies it`);
    hash.className = "tsnb-hash";
    const name = row.name ? `“${row.name}”` : "";
    const cells = [
      savedAt(row.at), sizeText(row.size), hash, plainText(row.enc ?? (this.store.status.steer ? "…" : "—")),
      plainText([name, metadataText(row.meta)].filter((part) => part && (part !== "—" || !name)).join(" ")),
    ];
    if (this.store.status.steer) cells.push(this.actions(row));
    tr.append(step, ...cells.map((content, i) => {
      const cell = make("td", i === 1 ? "tsnb-number" : i === 4 ? "tsnb-free" : "");
      cell.append(content);
      return cell;
    }));
    tr.title = row.id;
    return tr;
  }

  actions(row) {
    const group = make("span", "tsnb-buttons");
    const does = (what) => () => this.store.command(what, { id: row.id });
    const of = (button) => {
      button.setAttribute("aria-description", `the checkpoint of step ${row.step}`);
      return button;
    };
    group.append(...[
      makeButton("Load", does("rollback"), "go back to this state; a run is paused there"),
      makeButton("Branch", does("branch"), "a new training client from this state"),
      makeButton("Export", does("export"), "write the weights in the clear, as a folder for PEFT, where the notebook is"),
      makeSure("Delete", "Delete for good?", does("delete")),
    ].map(of));
    return group;
  }

  async copy(button, row) {
    try {
      await navigator.clipboard.writeText(row.hash);
      button.textContent = "copied";
    } catch {
      button.textContent = row.hash; // a page without the right to the clipboard: there it is, to be selected
      return;
    }
    setTimeout(() => (button.textContent = row.hash.slice(0, 12)), 1500);
  }
}

export { Checkpoints, metadataText, savedAt };
