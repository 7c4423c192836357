// A comparison: each arm's mean with its interval, the table, and what may be said of each pair.
import { connect } from "./wire.js";
import { Note, fill, make, makeButton, plainText, scrollable } from "./page.js";
import { LAST_WORD, Place, asking } from "./place.js";
import { Chart, Lens } from "./chart.js";

const RACE_STALE_MS = 15000;
const RACE_SIGNS = { RUNNING: "●", PAUSED: "‖", STOPPED: "■", CANCELLED: "■", FINISHED: "✓", FAILED: "✕", INTERRUPTED: "✕" };
const RACE_DASHES = [[], [7, 3], [2, 2], [9, 3, 2, 3], [4, 4], [12, 4]];

// How fresh what is shown is.
function raceFreshness(status, silence, cut) {
  if (cut) return `${LAST_WORD}; tn.load_comparison("${status.id}") shows what is on the disk`;
  if (!status.active) return "up to date";
  return silence > RACE_STALE_MS ? `STALE: no news for ${Math.round(silence / 1000)} s` : "live";
}

class ComparisonView {
  constructor(store, model, el) {
    Object.assign(this, { store, model, lens: new Lens(), chart: null, kind: "", told: "" });
    this.build(el);
    this.update = () => this.refresh();
    store.listeners.add(this.update);
    this.timer = setInterval(this.update, 1000);
    this.place = new Place(this.root, el);
    this.refresh();
  }

  build(el) {
    this.root = make("section", "tsnb-panel tsnb-race");
    this.root.dataset.lmSuppressShortcuts = "true";
    this.root.setAttribute("aria-label", this.model.get("title"));
    const badge = make("span", "tsnb-badge");
    this.sign = make("span", "tsnb-sign");
    this.sign.setAttribute("aria-hidden", "true");
    this.word = make("span");
    badge.append(this.sign, this.word);
    this.facts = make("span", "tsnb-facts");
    this.buttons = make("span", "tsnb-buttons");
    this.turn = makeButton("Pause", (button) => this.store.command(button.dataset.do));
    this.stop = makeButton("Stop", () => this.store.command("stop"), "ends every run after its step; what stands is the result");
    this.stop.dataset.do = "stop";
    this.buttons.append(this.turn, this.stop);
    const head = make("div", "tsnb-head");
    this.operator = make("span", "tsnb-operator", "operator view, not covered by ε");
    head.append(badge, this.facts, this.operator, this.buttons);
    this.bar = make("div", "tsnb-bar");
    this.bar.setAttribute("role", "progressbar");
    this.bar.setAttribute("aria-label", "steps done");
    this.bar.append(make("div"));
    this.note = new Note(this.store);
    this.grid = make("div", "tsnb-grid-of-charts");
    this.table = make("div", "tsnb-scroll");
    scrollable(this.table, "the arms as a table");
    this.verdicts = make("ul", "tsnb-verdicts");
    this.verdicts.setAttribute("role", "status");
    this.more = make("details", "tsnb-notes");
    this.fresh = make("span", "tsnb-fresh");
    this.voice = make("span", "tsnb-voice");
    this.voice.setAttribute("aria-live", "polite");
    const foot = make("div", "tsnb-foot");
    this.subject = make("span", "tsnb-subject");
    foot.append(this.subject, this.fresh, this.voice);
    this.root.append(head, this.bar, this.note.el, this.grid, this.verdicts, this.table, this.more, foot);
    el.append(this.root);
  }

  refresh() {
    const { store } = this;
    const { status } = store;
    const silence = store.now() - store.heardAt;
    const stale = Boolean(status.active) && silence > RACE_STALE_MS;
    if (stale && store.answered && !store.cut) store.greet();
    const doubted = stale || store.cut;
    const state = status.state || "";
    this.root.dataset.state = state;
    this.root.dataset.doubt = store.cut ? "NO KERNEL" : "";
    this.root.dataset.stale = String(stale);
    this.root.dataset.points = store.points;
    this.root.dataset.acked = store.acked;
    fill(this.sign, doubted ? "?" : RACE_SIGNS[state] || "○");
    fill(this.word, state ? `${doubted ? "last heard: " : ""}${state}` : "…");
    fill(this.facts, plainText(status.head ?? ""));
    fill(this.subject, plainText(this.model.get("title")));
    fill(this.fresh, state ? raceFreshness(status, silence, store.cut) : asking(store, store.now()));
    this.operator.hidden = !status.dp;
    this.bar.hidden = !status.of;
    this.bar.setAttribute("aria-valuemax", status.of || 0);
    this.bar.setAttribute("aria-valuenow", status.step || 0);
    this.bar.firstChild.style.width = `${status.of ? (100 * status.step) / status.of : 0}%`;
    this.buttons.hidden = !status.active || store.cut || !status.steer;
    this.turn.dataset.do = state === "PAUSED" ? "resume" : "pause";
    fill(this.turn, state === "PAUSED" ? "Resume" : "Pause");
    for (const button of [this.turn, this.stop]) button.setAttribute("aria-busy", String(store.pending.size > 0));
    this.note.update(state === "FAILED" ? status.reason || "" : "", this.place.outdated(status.hint));
    this.showChart();
    this.showStanding();
    if (state && state !== this.spoken) {
      this.spoken = state;
      this.voice.textContent = `${state}. ${(store.parts.standing?.verdicts ?? []).join(". ")}`;
      this.chart?.describe();
    }
  }

  showChart() {
    const { labels, curve } = this.store.status;
    const kind = JSON.stringify([labels, curve]);
    if (!labels || kind === this.kind) return this.chart?.schedule();
    this.kind = kind;
    this.chart?.destroy();
    const lines = labels.map((label, i) => ({
      name: String(i), spread: `${i}±`, label: plainText(label), colour: i % 6, dash: RACE_DASHES[(i + Math.floor(i / 6)) % 6],
      dots: curve?.startsWith("eval/"),
    }));
    this.chart = new Chart(this.store, this.model, this.lens, { title: curve ?? "", lines, log: false, marks: false, bandText: "95 % interval over the seeds" });
    this.grid.replaceChildren(this.chart.el);
    this.chart.schedule();
  }

  showStanding() {
    const found = this.store.parts.standing;
    const key = JSON.stringify(found ?? "");
    if (key === this.told) return;
    this.told = key;
    if (!found) return;
    this.verdicts.replaceChildren(...found.verdicts.map(([text, seen]) => make("li", seen ? "tsnb-seen" : "", plainText(text))));
    const table = make("table");
    const row = (tag, cells) => {
      const tr = make("tr");
      for (const [i, text] of cells.entries()) {
        const cell = make(tag === "td" && !i ? "th" : tag, found.numbers[i] ? "tsnb-number" : i === cells.length - 1 ? "tsnb-free" : "", plainText(text));
        if (cell.tagName === "TH") cell.scope = tag === "th" ? "col" : "row";
        tr.append(cell);
      }
      table.append(tr);
    };
    row("th", found.columns);
    for (const cells of found.rows) row("td", cells);
    this.table.replaceChildren(table);
    const open = this.more.open;
    this.more.replaceChildren(make("summary", "", "How to read this"), ...found.notes.map((text) => make("p", "", plainText(text))));
    this.more.open = open;
  }

  destroy() {
    clearInterval(this.timer);
    this.store.listeners.delete(this.update);
    this.chart?.destroy();
    this.place.destroy();
  }
}

export default () => {
  let store;
  return {
    initialize({ model }) {
      store = connect(model);
    },
    render({ model, el }) {
      const view = new ComparisonView(store, model, el);
      return () => view.destroy();
    },
  };
};
export { ComparisonView, raceFreshness };
