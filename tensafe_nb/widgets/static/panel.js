// The panel: badge, buttons, alarms, charts, privacy, samples, checkpoints, and a line that says how fresh all this is.
import { connect, settle } from "./wire.js";
import { Note, explain, make, makeButton, makeSure, plainText } from "./page.js";
import { LAST_WORD, Place, asking, unfold } from "./place.js";
import { Curves } from "./curves.js";
import { Checkpoints } from "./table.js";
import { Samples } from "./samples.js";
import { Meter } from "./meter.js";

const STALE_MS = 12000;
const SPEAK_MS = 60000;
const SILENT_S = 60; // after which the run of another kernel may be taken over
const BADGE = {
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
    status.now ? `client at step ${status.now.step}` : "",
    clockText(status.elapsed == null ? null : status.elapsed + (running ? since : 0)),
    leftText(status.eta == null ? null : Math.max(0, status.eta - since)),
    status.op && status.op_s + since >= 1 ? `${status.op} ${(status.op_s + since).toFixed(1)} s` : "",
    status.queue ? `${status.queue} in the queue` : "",
  ];
  return parts.filter(Boolean);
}

// How sure one can be of what is shown: "" where it is of this moment, else a word for what is not known.
function doubt(status, silence, cut = false) {
  if (status.state && cut) return "NO KERNEL";
  if (status.active && silence > STALE_MS) return "STALE";
  if (status.line && status.line !== "OPEN") return status.line;
  return status.silent > SILENT_S ? "SILENT" : "";
}

// How it goes, in a line with its level. That no problem was found is said of what was looked at to this moment only.
function verdict(status, alarms, doubted, account = null) {
  const { state, client, run } = status;
  const at = status.step == null ? "" : ` at step ${status.step}`;
  if (client === "ERROR") return { level: "red", text: "✕ The training client has failed." };
  if (state === "FAILED") return { level: "red", text: `✕ The run has failed${at}.` };
  if (state === "INTERRUPTED") return { level: "red", text: `✕ The run was interrupted${at}.` };
  if (doubted) return { level: "amber", text: "? How it goes now is not known here." };
  if (account?.void) return { level: "amber", text: "! This training has no privacy guarantee any more." };
  if (alarms.length || !run || !status.step) return { level: "", text: "" };
  if (state === "STOPPED" && status.reason) return { level: "", text: "" };
  return { level: "", text: "✓ no problem found" };
}

// Which buttons a state offers.
function offers(status) {
  if (!status.steer || ["TERMINATED", "ERROR"].includes(status.client) || status.line === "LOST") return [];
  if (!status.run || status.ended) return status.queue ? ["cancel", "checkpoint"] : ["checkpoint"];
  if (status.foreign) return ["checkpoint"]; // who started it pauses and stops it
  return [status.state.startsWith("PAUS") ? "resume" : "pause", "stop", "checkpoint"];
}

// The alarm to show first: the newest of the worst.
function worst(alarms) {
  return alarms.reduce((found, alarm) => (!found || alarm.level === found.level || alarm.level === "red" ? alarm : found), null);
}

function freshness(status, silence, cut = false) {
  if (cut) return `${LAST_WORD}${status.run_id ? `; tn.load_run("${status.run_id}") shows what is on the disk` : ""}`;
  if (status.line && status.line !== "OPEN") return "nothing comes from the server: what is shown is its last word";
  if (!status.active) return "up to date";
  if (status.silent > SILENT_S) return `the client that drives this run has told nothing for ${clockText(status.silent)}: its kernel may have ended`;
  if (silence > STALE_MS) return `STALE: no news for ${Math.round(silence / 1000)} s; asking the kernel again`;
  return `${status.foreign ? "driven by another client · " : status.steer ? "live · " : ""}last update ${(silence / 1000).toFixed(1)} s ago`;
}

// A button that opens a list of the checkpoints, to choose one for a command.
class Menu {
  constructor(store, text, command) {
    Object.assign(this, { store, command });
    this.el = make("span", "tsnb-menu");
    this.list = make("div");
    this.button = makeButton(`${text} ▾`, () => this.open(this.list.hidden));
    this.el.append(this.button, this.list);
    this.el.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || this.list.hidden) return;
      this.open(false);
      this.button.focus();
    });
    this.el.addEventListener("focusout", (event) => this.el.contains(event.relatedTarget) || this.open(false));
    this.open(false);
  }

  open(so) {
    this.list.hidden = !so;
    this.button.setAttribute("aria-expanded", String(so));
  }

  update(rows, offered) {
    this.el.hidden = !offered || !rows.length;
    const key = rows.map((row) => row.id).join();
    if (key === this.key) return;
    this.key = key;
    this.list.replaceChildren(...rows.slice(0, 12).map((row) => makeButton(`step ${row.step}`, () => {
      this.open(false);
      this.button.focus();
      this.store.command(this.command, { id: row.id });
    }, row.id)));
  }
}

// One view of the panel.
class Panel {
  constructor(store, model, el) {
    Object.assign(this, { store, model, title: model.get("title"), spokenAt: -Infinity, spoken: "", branches: new Map() });
    this.curves = new Curves(store, model, true);
    this.curves.onSpeak = (text) => (this.voice.textContent = text);
    this.curves.onChoose = () => this.samples.reveal();
    this.meter = new Meter(store);
    this.samples = new Samples(store, model);
    this.samples.onLeave = () => this.curves.charts[0].plot.focus();
    this.checkpoints = new Checkpoints(store);
    this.build(el);
    this.update = () => this.refresh();
    store.listeners.add(this.update);
    this.timer = setInterval(this.update, 500);
    this.place = new Place(this.root, el);
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
    this.marks = make("span", "tsnb-marks");
    this.facts = make("span", "tsnb-facts");
    this.buttons = make("span", "tsnb-buttons");
    this.menus = [new Menu(this.store, "Rollback", "rollback"), new Menu(this.store, "Branch", "branch")];
    this.fixed = [0, 1, 2].map(() => makeButton("", (button) => this.store.command(button.dataset.do)));
    this.buttons.append(...this.fixed, ...this.menus.map((menu) => menu.el));
    this.bar = make("div", "tsnb-bar");
    this.bar.setAttribute("role", "progressbar");
    this.bar.setAttribute("aria-label", "steps done");
    this.bar.append(make("div"));
    this.note = new Note(this.store);
    this.other = make("div", "tsnb-health");
    this.other.dataset.level = "amber";
    this.health = make("div", "tsnb-health");
    this.health.setAttribute("role", "status");
    this.below = make("div", "tsnb-branches");
    this.replicas = make("span", "tsnb-replicas");
    this.fresh = make("span", "tsnb-fresh");
    this.subject = make("span", "tsnb-subject");
    this.voice = make("span", "tsnb-voice");
    this.voice.setAttribute("aria-live", "polite");
    const head = make("div", "tsnb-head");
    head.append(this.badge, this.marks, this.facts, this.buttons);
    const foot = make("div", "tsnb-foot");
    foot.append(this.subject, this.replicas, this.fresh, this.voice);
    this.root.append(head, this.bar, this.note.el, this.other, this.health, this.curves.el, this.meter.el, this.samples.el, this.checkpoints.el, foot);
    el.append(this.root, this.below);
  }

  destroy() {
    clearInterval(this.timer);
    this.store.listeners.delete(this.update);
    this.curves.destroy();
    for (const view of this.branches.values()) view?.remove?.();
    this.place.destroy();
  }

  refresh() {
    const { store } = this;
    const silence = store.now() - store.heardAt;
    this.doubt = doubt(store.status, silence, store.cut);
    if (this.doubt === "STALE" && store.answered) store.greet();
    this.showState(this.doubt ? 0 : silence / 1000); // what is not heard of does not go on
    this.showSections();
    this.showButtons();
    this.showNote();
    this.showHealth();
    this.showBranches();
    explain(this.root, store.parts.words);
    this.fresh.textContent = store.status.state ? freshness(store.status, silence, store.cut) : asking(store, store.now());
    this.replicas.textContent = store.status.replicas ?? "";
    this.root.dataset.stale = String(this.doubt === "STALE");
    this.root.dataset.doubt = this.doubt;
    this.root.dataset.tries = store.tries;
    this.root.dataset.curve = this.curves.name;
    this.root.dataset.points = store.get(this.curves.name).n;
    this.root.dataset.acked = store.acked;
    if (store.latency !== null) this.root.dataset.latency = store.latency;
    this.speak();
  }

  showSections() {
    const chosen = this.model.get("sections");
    const shown = (names, there) => (chosen.length ? names.some((name) => chosen.includes(name)) : there);
    for (const [part, names, there] of [
      [this.curves, ["loss", "reward"], true], [this.meter, ["privacy"], this.store.status.dp || this.store.parts.privacy?.accountant], [this.samples, ["samples"], this.samples.known],
      [this.checkpoints, ["checkpoints"], this.store.parts.rows],
    ]) {
      part.el.hidden = !shown(names, there);
      if (!part.el.hidden || part === this.curves) part.update();
    }
  }

  showState(since) {
    const { status } = this.store;
    const state = status.state || "";
    this.root.dataset.state = state;
    this.root.dataset.client = status.client || "";
    this.root.dataset.step = status.step ?? "";
    this.sign.textContent = this.doubt ? "?" : BADGE[state] || "○";
    this.word.textContent = state ? `${this.doubt ? "last heard: " : ""}${state}` : "…";
    this.marks.textContent = [...(status.marks ?? []), this.doubt].filter(Boolean).join(" · ");
    this.root.dataset.now = status.now?.step ?? "";
    this.facts.textContent = state ? details(this.doubt ? { ...status, eta: null, op: null, queue: 0 } : status, since).join(" · ") : "";
    const run = status.run ? ` · run ${status.run}${status.name ? ` “${plainText(status.name)}”` : ""}` : "";
    const origin = (this.store.parts.marks?.marks ?? []).find(([, kind, what]) => kind === "f" && what.startsWith("from"));
    const fork = origin ? ` · ⎇ branch ${origin[2]} at step ${origin[0]}` : "";
    const open = status.dp === false && this.meter.el.hidden ? " · DP off" : "";
    this.subject.textContent = `${this.title}${run}${fork}${status.client ? ` · client ${status.client}` : ""}${open}${status.prompts ?? ""}`;
    this.bar.hidden = !status.of;
    this.bar.setAttribute("aria-valuemax", status.of || 0);
    this.bar.setAttribute("aria-valuenow", status.step || 0);
    this.bar.firstChild.style.width = `${status.of ? (100 * status.step) / status.of : 0}%`;
  }

  showButtons() {
    const offered = this.doubt === "NO KERNEL" ? [] : offers(this.store.status);
    const hadFocus = this.buttons.contains(document.activeElement) && document.activeElement;
    for (const [i, button] of this.fixed.entries()) {
      const what = offered[i];
      button.hidden = !what;
      if (!what) continue;
      button.dataset.do = what;
      button.textContent = what === "cancel" ? "Cancel queued" : what[0].toUpperCase() + what.slice(1);
      button.setAttribute("aria-busy", String(this.store.pending.size > 0));
    }
    for (const menu of this.menus) menu.update(this.checkpoints.rows, offered.length > 0);
    if (hadFocus && hadFocus.offsetParent === null) this.curves.charts[0].plot.focus(); // do not lose the reader's place
  }

  showNote() {
    const { status } = this.store;
    const failed = [status.state, status.client].some((state) => ["FAILED", "ERROR", "INTERRUPTED"].includes(state));
    const failures = [failed ? status.reason || "No reason was told." : "", status.line_reason ?? ""];
    const back = status.now?.loaded ? `${status.now.loaded} was loaded after the run had ended: the client stands at step ${status.now.step} again.` : "";
    const hints = [status.state === "STOPPED" && !failed ? status.reason : "", back, this.place.outdated(status.hint)];
    this.note.update(failures.filter(Boolean).join("\n"), hints.filter(Boolean).join("\n"));
    this.root.dataset.waiting = String(this.note.waiting);
    this.showOther(status.other);
  }

  // A kernel that takes the memory of this one.
  showOther(other) {
    if (other?.id === this.crowdedBy) return;
    this.crowdedBy = other?.id;
    this.other.replaceChildren(...(other ? [
      make("span", "", plainText(`! ${other.text} `)),
      makeSure(`Shut down ${plainText(other.name)}`, "Its variables go: sure?", () => this.store.command("shutdown", { id: other.id })),
    ] : []));
  }

  showHealth() {
    const { store } = this;
    const alarms = store.parts.alarms?.alarms ?? [];
    const said = verdict(store.status, alarms, this.doubt, store.parts.privacy);
    const key = JSON.stringify([alarms.at(-1)?.seq, said]);
    if (key === this.judged) return;
    this.judged = key;
    const alarm = worst(alarms);
    this.health.dataset.level = said.level || alarm?.level || "";
    const line = said.text ? [make(said.level ? "b" : "span", said.level ? "" : "tsnb-where", `${said.text} `)] : [];
    if (alarm) {
      const jump = makeButton(`Go to step ${alarm.step}`, () => {
        settle(this.model, "selected_step", alarm.step);
        this.curves.lens.set({ step: alarm.step });
        this.curves.onChoose();
      });
      const more = alarms.length > 1 ? make("details") : "";
      if (more) more.append(make("summary", "", `${alarms.length} alarms`), ...alarms.map((a) => make("div", "", plainText(`${a.level} at step ${a.step}: ${a.text} ${a.remedy}`))));
      line.push(make("b", "", `${alarm.level === "red" ? "✕" : "!"} step ${alarm.step}: `), make("span", "", plainText(`${alarm.text} `)), make("span", "tsnb-where", plainText(alarm.remedy)), jump, more);
    }
    this.health.replaceChildren(...line);
  }

  // A branch has a panel of its own, beneath this one.
  showBranches() {
    for (const { client, model } of this.store.parts.branches?.branches ?? []) {
      if (this.branches.has(model)) continue;
      this.branches.set(model, null);
      this.addBranch(client, model);
    }
  }

  async addBranch(client, id) {
    const place = make("div", "tsnb-branch");
    place.append(make("div", "tsnb-where", `⎇ branch ${client}: service.get_training_client("${client}")`));
    this.below.append(place);
    try {
      const manager = this.model.widget_manager;
      const view = await manager.create_view(await manager.get_model(id));
      this.branches.set(id, view);
      place.append(view.el);
    } catch (error) {
      place.append(make("div", "tsnb-where", `Its panel cannot be shown here: ${error.message}`));
    }
  }

  // Says a change of state at once, progress every minute at most; the curve is described when it rests.
  speak() {
    const { status, now } = { status: this.store.status, now: this.store.now() };
    if (!status.state || (status.state === this.spoken && now - this.spokenAt < SPEAK_MS)) return;
    if (status.state === this.spoken && !status.active) return;
    const turned = status.state !== this.spoken;
    this.spoken = status.state;
    this.spokenAt = now;
    this.voice.textContent = `${status.state}, step ${status.step}${status.of ? ` of ${status.of}` : ""}`;
    if (turned) this.curves.describe();
  }
}

export default () => {
  let store;
  return {
    initialize({ model }) {
      store = connect(model);
    },
    render({ model, el }) {
      if (globalThis.__MARIMO_STATIC__) return unfold(el);
      const panel = new Panel(store, model, el);
      return () => panel.destroy();
    },
  };
};
export { Panel, clockText, details, doubt, freshness, leftText, offers, verdict, worst };
