// The panel: badge, buttons, curve, and a line that says how fresh all this is.
import { connect } from "./wire.js";
import { Chart, make, summary } from "./chart.js";

const WAITING_MS = 1000;
const STALE_MS = 12000;
const SPEAK_MS = 10000;
const WAITING = "waiting for the running cell; ■ frees it";
const SIGNS = {
  RUNNING: "●", PAUSING: "●", STOPPING: "●", PAUSED: "‖", STOPPED: "■", FINISHED: "✓", FAILED: "✕", INTERRUPTED: "✕",
  ERROR: "✕", TERMINATED: "■", INITIALIZING: "○", READY: "○", BUSY: "●",
};

function clockText(seconds) {
  if (seconds == null) return "—";
  const whole = Math.floor(seconds);
  const two = (n) => String(n).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  const rest = `${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
  return hours ? `${hours}:${rest}` : rest;
}

function leftText(seconds) {
  if (seconds == null) return "";
  if (seconds < 90) return `~${Math.max(1, Math.round(seconds))} s left`;
  return seconds < 5400 ? `~${Math.round(seconds / 60)} min left` : `~${(seconds / 3600).toFixed(1)} h left`;
}

// The facts beside the badge, most important first. `since` is the age of the status in seconds.
function details(status, since) {
  const running = status.active && !status.ended;
  const parts = [
    status.of ? `step ${status.step}/${status.of}` : `step ${status.step ?? "—"}`,
    clockText(status.elapsed == null ? null : status.elapsed + (running ? since : 0)),
    leftText(status.eta == null ? null : Math.max(0, status.eta - since)),
    status.op && status.op_s + since >= 1 ? `${status.op} ${(status.op_s + since).toFixed(1)} s` : "",
    status.queue ? `${status.queue} in the queue` : "",
  ];
  return parts.filter(Boolean);
}

// Which buttons a state offers.
function offers(status) {
  if (!status.run || status.ended) return [];
  const paused = status.state === "PAUSED" || status.state === "PAUSING";
  return [paused ? "resume" : "pause", "stop"];
}

function freshness(status, silence) {
  if (!status.state) return "waiting for the kernel";
  if (!status.active) return "up to date";
  if (silence > STALE_MS) return `STALE: no news for ${Math.round(silence / 1000)} s`;
  return `live · last update ${(silence / 1000).toFixed(1)} s ago`;
}

// One view of the panel.
class Panel {
  constructor(store, title, el) {
    this.store = store;
    this.title = title;
    this.chart = new Chart(store);
    this.spokenAt = -Infinity;
    this.spoken = "";
    this.build(el);
    this.chart.onSpeak = (text) => (this.voice.textContent = text);
    this.update = () => this.refresh();
    store.listeners.add(this.update);
    this.timer = setInterval(this.update, 500);
    this.placed = new ResizeObserver(() => this.takePlace());
    this.placed.observe(el);
    this.refresh();
  }

  build(el) {
    this.root = make("section", "tsnb-panel");
    this.root.dataset.lmSuppressShortcuts = "true"; // keys pressed in here are not the notebook's
    this.root.setAttribute("aria-label", `Training panel of ${this.title}`);
    this.badge = make("span", "tsnb-badge");
    this.sign = make("span", "tsnb-sign");
    this.sign.setAttribute("aria-hidden", "true");
    this.word = make("span");
    this.badge.append(this.sign, this.word);
    this.facts = make("span", "tsnb-facts");
    this.buttons = make("span", "tsnb-buttons");
    this.toggle = this.button();
    this.halt = this.button();
    this.buttons.append(this.toggle, this.halt);
    this.bar = make("div", "tsnb-bar");
    this.bar.setAttribute("role", "progressbar");
    this.bar.setAttribute("aria-label", "steps done");
    this.bar.append(make("div"));
    this.note = make("div", "tsnb-note");
    this.note.setAttribute("role", "alert");
    this.fresh = make("span", "tsnb-fresh");
    this.subject = make("span", "tsnb-subject");
    this.voice = make("span", "tsnb-voice");
    this.voice.setAttribute("aria-live", "polite");
    const head = make("div", "tsnb-head");
    head.append(this.badge, this.facts, this.buttons);
    const foot = make("div", "tsnb-foot");
    foot.append(this.subject, this.fresh, this.voice);
    this.root.append(head, this.bar, this.note, this.chart.el, foot);
    el.append(this.root);
  }

  button() {
    const button = make("button");
    button.type = "button";
    button.addEventListener("click", () => this.store.command(button.dataset.do));
    return button;
  }

  destroy() {
    clearInterval(this.timer);
    this.placed.disconnect();
    this.store.listeners.delete(this.update);
    this.chart.destroy();
    this.leavePlace();
  }

  // While this view is there, the picture and the table of the same cell stay out of sight.
  takePlace() {
    const area = this.root.closest(".jp-OutputArea");
    if (!area || area === this.area) return;
    this.leavePlace();
    this.area = area;
    area.classList.add("tsnb-live");
  }

  leavePlace() {
    const others = this.area ? [...this.area.querySelectorAll(".tsnb-panel")].filter((root) => root !== this.root) : [];
    if (this.area && !others.length) this.area.classList.remove("tsnb-live");
  }

  refresh() {
    const { store } = this;
    const silence = store.now() - store.heardAt;
    this.showState(silence / 1000);
    this.showButtons();
    this.showNote();
    this.fresh.textContent = freshness(store.status, silence);
    this.root.dataset.stale = String(Boolean(store.status.active) && silence > STALE_MS);
    this.root.dataset.curve = this.chart.name;
    this.root.dataset.points = this.store.get(this.chart.name).n;
    this.root.dataset.acked = store.acked;
    if (store.latency !== null) this.root.dataset.latency = store.latency;
    this.speak();
    this.chart.schedule();
  }

  showState(since) {
    const { status } = this.store;
    const state = status.state || "";
    this.root.dataset.state = state;
    this.root.dataset.client = status.client || "";
    this.root.dataset.step = status.step ?? "";
    this.sign.textContent = SIGNS[state] || "○";
    this.word.textContent = state || "…";
    this.facts.textContent = state ? details(status, since).join(" · ") : "";
    const run = status.run ? ` · run ${status.run}` : "";
    this.subject.textContent = `${this.title}${run}${status.client ? ` · client ${status.client}` : ""}`;
    this.bar.hidden = !status.of;
    this.bar.setAttribute("aria-valuemax", status.of || 0);
    this.bar.setAttribute("aria-valuenow", status.step || 0);
    this.bar.firstChild.style.width = `${status.of ? (100 * status.step) / status.of : 0}%`;
  }

  showButtons() {
    const [first, second] = offers(this.store.status);
    const busy = this.store.pending.size > 0;
    const hadFocus = this.buttons.contains(document.activeElement);
    for (const [button, what] of [[this.toggle, first], [this.halt, second]]) {
      button.hidden = !what;
      if (!what) continue;
      button.dataset.do = what;
      button.textContent = what[0].toUpperCase() + what.slice(1);
      button.setAttribute("aria-busy", String(busy));
    }
    if (hadFocus && !first) this.chart.plot.focus(); // the pressed button is gone: do not lose the reader's place
  }

  showNote() {
    const { pending, refusal, error, status } = this.store;
    const longest = Math.max(...[...pending.values()].map((since) => this.store.now() - since), 0);
    const waiting = longest > WAITING_MS ? WAITING : "";
    const failed = status.state === "FAILED" || status.state === "ERROR" || status.client === "ERROR";
    const text = [failed ? status.reason : "", error, refusal, waiting].filter(Boolean).join("\n");
    this.root.dataset.waiting = String(Boolean(waiting));
    this.note.classList.toggle("tsnb-wrong", failed || Boolean(error));
    this.note.hidden = !(text || status.hint);
    const shown = text || status.hint || "";
    if (this.note.textContent !== shown) this.note.textContent = shown;
  }

  // Says a change of state at once, progress every ten seconds at most; the curve is described when it rests.
  speak() {
    const { status, now } = { status: this.store.status, now: this.store.now() };
    if (!status.state || (status.state === this.spoken && now - this.spokenAt < SPEAK_MS)) return;
    if (status.state === this.spoken && !status.active) return;
    const turned = status.state !== this.spoken;
    this.spoken = status.state;
    this.spokenAt = now;
    this.voice.textContent = `${status.state}, step ${status.step}${status.of ? ` of ${status.of}` : ""}`;
    if (turned || !this.chart.plot.hasAttribute("aria-label")) this.chart.describe();
  }
}

export default () => {
  let store;
  return {
    initialize({ model }) {
      store = connect(model);
    },
    render({ model, el }) {
      const panel = new Panel(store, model.get("title"), el);
      return () => panel.destroy();
    },
  };
};
export { Panel, clockText, details, freshness, leftText, offers };
