// A recorded run in a page without a kernel: the panel, fed from a tape; widgets/tape.py makes it.
import { Store } from "./wire.js";
import { make, makeButton, makeSelect } from "./page.js";
import { Panel } from "./panel.js";
import { followScheme } from "./scheme.js";

const PACES = [0.25, 0.5, 1, 2, 5, 10];
const NO_SAMPLES = "This page was saved without prompts and answers: save_page(…, samples=4) keeps some of each step.";
const NO_SAMPLES_OF_STEP = "This page keeps the samples of other steps.";

// What the panel takes for its widget: public traits, and a line to a kernel that is not there.
class TapeModel {
  constructor(traits, send) {
    Object.assign(this, { traits, send, listeners: [] });
  }

  get(name) {
    return this.traits[name];
  }

  set(name, value) {
    this.traits[name] = value;
    for (const [event, listener] of this.listeners) if (["change", `change:${name}`].includes(event)) listener();
  }

  on(event, listener) {
    this.listeners.push([event, listener]);
  }

  save_changes() {}
}

class TapeStore extends Store {
  forget() {
    for (const series of this.series.values()) series.clear();
    Object.assign(this, { status: {}, parts: {}, newest: undefined });
    this.rollouts.clear();
    this.takeBreaks([]);
    this.takeSpans({});
  }
}

// What all of these messages add up to: the last of each kind, the points of all, the status that counts them.
function addedUp(messages) {
  const [last, columns] = [new Map(), {}];
  let step;
  for (const message of messages) {
    if (message.t !== "delta") last.set(message.t, message);
    if (["delta", "status"].includes(message.t)) step = message.step ?? step;
    for (const [name, [offset, steps, values]] of Object.entries(message.s ?? {})) {
      const column = (columns[name] ??= [offset, [], []]);
      for (const [i, value] of values.entries()) {
        column[1].push(steps[i]);
        column[2].push(value);
      }
    }
  }
  const status = last.get("status");
  last.delete("status");
  const points = Object.keys(columns).length ? [{ t: "delta", s: columns, step }] : [];
  return [...last.values(), ...points, ...(status ? [{ ...status, step }] : [])];
}

function timeText(seconds, whole) {
  const digits = whole < 60 ? 1 : 0;
  const minutes = Math.floor(seconds / 60);
  return minutes ? `${minutes}:${String(Math.floor(seconds % 60)).padStart(2, "0")}` : `${seconds.toFixed(digits)} s`;
}

class Player {
  constructor(tape, el) {
    Object.assign(this, { tape, el, at: 0, next: 0, speed: tape.speed, playing: false, begun: false });
    this.whole = tape.frames.at(-1)[0];
    this.steps = Object.keys(tape.rollouts ?? {}).map(Number);
    this.model = new TapeModel({ title: tape.title, sections: [], smoothing: 0.8, log_scale: false, x_axis: "step", selected_step: null }, (content) => this.answer(content));
    this.store = new TapeStore((content) => this.model.send(content), this.model.get("smoothing"));
    this.model.on("change:smoothing", () => this.store.setSmoothing(this.model.get("smoothing")));
    this.model.on("change", () => this.store.tell());
    this.build();
    this.panel = new Panel(this.store, this.model, this.el);
    this.seek(0);
  }

  build() {
    const bar = make("div", "tsnb-player");
    bar.setAttribute("role", "group");
    bar.setAttribute("aria-label", "replay");
    this.button = makeButton("", () => this.play(!this.playing));
    this.slider = make("input");
    Object.assign(this.slider, { type: "range", min: 0, max: this.whole, step: "any", value: 0 });
    this.slider.setAttribute("aria-label", "moment of the run");
    this.slider.addEventListener("input", () => {
      const moment = Number(this.slider.value); // what is shown next is the moment before
      this.play(false);
      this.seek(moment);
    });
    this.clock = make("output");
    const speeds = PACES.map((pace) => [String(pace * this.tape.speed), `× ${pace * this.tape.speed}`]);
    this.pace = makeSelect("speed", speeds, String(this.speed), (value) => (this.speed = Number(value)));
    bar.append(this.button, this.slider, this.clock, this.pace);
    this.el.append(bar);
  }

  // Whoever asks is the panel, and it asks for samples: a tape has no buttons that steer, and no gaps.
  answer(content) {
    if (content.t !== "show") return;
    const { rollouts } = this.tape;
    const found = rollouts?.[content.step] ?? { t: "rollouts", step: content.step, why: rollouts ? NO_SAMPLES_OF_STEP : NO_SAMPLES };
    queueMicrotask(() => this.store.receive(found));
  }

  // Goes to a moment: forwards by what is told until then, backwards by telling everything anew.
  seek(moment) {
    if (moment < this.at || this.next === 0) {
      this.store.forget();
      this.next = 0;
    }
    const from = this.next;
    const { frames } = this.tape;
    while (this.next < frames.length && (frames[this.next][0] <= moment || this.next === 0)) this.next++;
    this.at = moment;
    const told = frames.slice(from, this.next).flatMap(([, messages]) => messages);
    for (const message of addedUp(told)) this.store.receive(message);
    const reached = this.store.status.step ?? 0;
    const newest = this.steps.filter((step) => step <= reached).at(-1);
    if (newest !== undefined && newest !== this.store.newest) this.store.receive(this.tape.rollouts[newest]);
    this.show();
  }

  play(so) {
    if (so && this.at >= this.whole) this.seek(0);
    this.playing = so;
    this.begun ||= so;
    this.show();
    if (so) this.goOn(performance.now());
  }

  goOn(since) {
    requestAnimationFrame((now) => {
      if (!this.playing) return;
      this.seek(Math.min(this.whole, this.at + (this.speed * Math.max(0, now - since)) / 1000));
      if (this.at >= this.whole) this.play(false);
      else this.goOn(now);
    });
  }

  show() {
    const ended = this.at >= this.whole;
    const word = this.playing ? "Pause" : ended ? "Play again" : "Play";
    if (this.button.textContent !== word) this.button.textContent = word;
    this.button.dataset.do = this.playing ? "pause" : "resume";
    this.slider.value = this.at;
    this.clock.textContent = `${timeText(this.at, this.whole)} of ${timeText(this.whole, this.whole)}`;
    this.slider.setAttribute("aria-valuetext", this.clock.textContent);
    Object.assign(this.el.dataset, { playing: this.playing, ended, points: this.store.points });
  }
}

// Plays each tape of a page once it is looked at; whoever wants things still begins with the end.
function playAll() {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const players = new Map();
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const player = players.get(target);
      if (isIntersecting && !player.begun) player.play(true);
    }
  }, { threshold: 0.4 });
  for (const el of document.querySelectorAll(".tsnb-tape")) {
    const player = new Player(JSON.parse(el.querySelector("script").textContent), el);
    players.set(el, player);
    if (still) player.seek(player.whole);
    else seen.observe(el);
  }
  const all = (action) => [...players.values()].forEach(action);
  addEventListener("beforeprint", () => all((player) => {
    player.seek(player.whole);
    for (const chart of player.panel.curves.charts) chart.draw(); // also those that are not on the screen
  }));
  followScheme();
}

if (typeof document !== "undefined") playAll();
export { TapeModel, TapeStore, addedUp, timeText };
