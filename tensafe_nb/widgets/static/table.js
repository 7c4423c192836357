// The checkpoints as a table, with what can be done with each.
import { make, makeButton, makeSure, plainText } from "./page.js";

function sizeText(bytes) {
  return bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
}

function metadataText(meta) {
  const entries = Object.entries(meta ?? {});
  return entries.length ? entries.map(([name, value]) => `${name}: ${value}`).join(", ") : "—";
}

class Checkpoints {
  constructor(store) {
    this.store = store;
    this.el = make("div", "tsnb-checkpoints tsnb-scroll");
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
    for (const name of ["step", "saved at", "size", "hash", "sealed with", "metadata", ""]) {
      const cell = make("th", "", name);
      cell.scope = "col";
      head.append(cell);
    }
    table.append(make("caption", "", rows.length || saving ? "checkpoints" : "no checkpoint yet"), head);
    if (saving) {
      const cell = make("td", "", `${saving} waiting to be written`);
      cell.colSpan = 7;
      const line = make("tr", "tsnb-waiting");
      line.append(cell);
      table.append(line);
    }
    table.append(...rows.map((row) => this.line(row)));
    this.el.replaceChildren(table);
  }

  line(row) {
    const tr = make("tr");
    const step = make("th", "", String(row.step));
    step.scope = "row";
    const hash = makeButton(row.hash.slice(0, 12), (button) => this.copy(button, row), `${row.hash}: a click copies it`);
    hash.className = "tsnb-hash";
    const cells = [new Date(row.at * 1000).toLocaleTimeString(), sizeText(row.size), hash, plainText(row.enc ?? "…"), plainText(`${row.name ? `“${row.name}” ` : ""}${metadataText(row.meta)}`), this.actions(row)];
    tr.append(step, ...cells.map((content) => {
      const cell = make("td");
      cell.append(content);
      return cell;
    }));
    tr.title = row.id;
    return tr;
  }

  actions(row) {
    const group = make("span", "tsnb-buttons");
    if (!this.store.status.steer) return group;
    const does = (what) => () => this.store.command(what, row.id);
    group.append(
      makeButton("Load", does("rollback"), "go back to this state; a run is paused there"),
      makeButton("Branch", does("branch"), "a new training client from this state"),
      makeButton("Export", does("export"), "write the weights in the clear, as a folder for PEFT, where the notebook is"),
      makeSure("Delete", "Delete for good?", does("delete")),
    );
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

export { Checkpoints, metadataText, sizeText };
