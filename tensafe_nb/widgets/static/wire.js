// The page's half of the wire: a cache of the history that the kernel holds. Other half: widgets/wire.py.
// Every message says at which point of a series it starts; whoever finds a gap says hello and is told everything.
import { Line, PROTOCOL, tie } from "./line.js";

const RETRY_MS = 2000;

// JSON has no NaN: non-finite numbers travel by name.
function parseNumber(value) {
  return typeof value === "string" ? { nan: NaN, inf: Infinity, "-inf": -Infinity }[value] : value;
}

// A growing curve with its bias-corrected exponential mean (Kingma and Ba 2015, section 3).
class Series {
  constructor(smoothing, breaks = []) {
    this.smoothing = smoothing;
    this.breaks = breaks; // steps at which something else began to be measured: nothing is averaged across
    this.spans = null; // [from, to) of the points that led to the weights as they are; null: all of them
    this.abandoned = [];
    this.clear();
  }

  clear() {
    this.n = this.bad = 0;
    this.steps = new Float64Array(256);
    this.values = new Float64Array(256);
    this.smooth = new Float64Array(256);
    this.mean = this.weight = 0;
    this.wentBack = false;
    this.left = 0; // as many values as are zero from the first on, as far as was counted
    this.branch = null;
  }

  append(steps, values) {
    this.reserve(this.n + steps.length);
    this.steps.set(steps, this.n);
    this.values.set(values, this.n);
    const from = this.n;
    this.n += steps.length;
    for (let i = Math.max(from, 1); i < this.n; i++) this.wentBack ||= this.steps[i] <= this.steps[i - 1];
    this.branch = null;
    this.smoothFrom(from);
  }

  // The curve as it stands: after a rollback without what was abandoned, which lies in `abandoned`, piece by piece.
  get current() {
    if (!this.wentBack && !this.spans) return this;
    this.branch ??= this.parted();
    return this.branch;
  }

  parted() {
    const [kept, pieces] = [[], []];
    const led = (i) => this.spans?.some(([from, to]) => i >= from && i < (to ?? Infinity)) ?? true;
    let reached = Infinity;
    for (let i = this.n - 1, gap = true; i >= 0; i--) {
      const live = led(i) && this.steps[i] < reached;
      if (live) {
        reached = this.steps[i];
        kept.push(i);
      } else {
        if (gap || this.steps[i] >= this.steps[i + 1]) pieces.push([]); // a piece goes forwards only
        pieces.at(-1).push(i);
      }
      gap = live;
    }
    const pick = (indices) => {
      const piece = new Series(this.smoothing, this.breaks);
      indices.reverse();
      piece.append(Float64Array.from(indices, (i) => this.steps[i]), Float64Array.from(indices, (i) => this.values[i]));
      return piece;
    };
    const branch = pick(kept);
    branch.abandoned = pieces.map(pick);
    return branch;
  }

  reserve(size) {
    for (let room = this.steps.length; room < size; ) {
      room *= 2;
      for (const column of ["steps", "values", "smooth"]) {
        const grown = new Float64Array(room);
        grown.set(this[column].subarray(0, this.n));
        this[column] = grown;
      }
    }
  }

  smoothFrom(from) {
    for (let i = from; i < this.n; i++) {
      const value = this.values[i];
      if (this.breaks.includes(this.steps[i])) this.mean = this.weight = 0;
      if (Number.isFinite(value)) {
        this.mean = this.smoothing * this.mean + (1 - this.smoothing) * value;
        this.weight = this.smoothing * this.weight + (1 - this.smoothing);
      } else {
        this.bad++;
      }
      this.smooth[i] = this.weight ? this.mean / this.weight : NaN;
    }
  }

  setSpans(spans) {
    if (JSON.stringify(spans) === JSON.stringify(this.spans)) return;
    this.spans = spans;
    this.branch = null;
  }

  resmooth(smoothing, breaks = this.breaks) {
    this.smoothing = smoothing;
    this.breaks = breaks;
    this.mean = this.weight = this.bad = 0;
    this.branch = null;
    this.smoothFrom(0);
  }
}

// What a page knows of a training.
class Store extends Line {
  constructor(send, smoothing, now, later) {
    super(send, now, later);
    this.smoothing = smoothing;
    this.spans = {};
    this.series = new Map();
    this.parts = {}; // what the kernel tells besides curves and status, by its name
    this.rollouts = new Map(); // step → its rollouts
    this.heldOut = new Map(); // step → the answers to the held-out prompts
    this.held = []; // the steps at which there are such
    this.breaks = [];
    this.latency = null;
    this.heard = Date.now();
  }

  get size() {
    return this.points;
  }

  get points() {
    let sum = 0;
    for (const series of this.series.values()) sum += series.n;
    return sum;
  }

  get(name) {
    const breaks = name.includes("reward") ? this.breaks : [];
    if (!this.series.has(name)) {
      this.series.set(name, new Series(this.smoothing, breaks));
      this.series.get(name).setSpans(this.spans[name] ?? null);
    }
    return this.series.get(name);
  }

  // Says that something was missed; not twice within two seconds.
  hello() {
    if (this.now() - this.asked < RETRY_MS) return;
    this.asked = this.now();
    this.send({ t: "hello", v: PROTOCOL, n: this.points });
  }

  show(step, held = false) {
    if (!(held ? this.heldOut : this.rollouts).has(step)) this.send({ t: "show", step, ...(held ? { held } : {}) });
  }

  setSmoothing(weight) {
    this.smoothing = weight;
    for (const series of this.series.values()) series.resmooth(weight);
    this.tell();
  }

  take(message, buffers) {
    this.heard = Date.now();
    if (message.t === "delta") this.takeDelta(message);
    else if (message.t === "full") this.takeColumns(message, buffers);
    else if (message.t === "status") this.takeStatus(message);
    else if (message.t === "rollouts") this.takeRollouts(message);
    else this.parts[message.t] = message;
    if (message.t === "marks") this.takeBreaks(message.marks);
    if (message.t === "spans") this.takeSpans(message.spans);
  }

  takeRollouts(message) {
    const kept = message.held ? this.heldOut : this.rollouts;
    kept.delete(message.step);
    kept.set(message.step, message);
    if (kept.size > 8) kept.delete(kept.keys().next().value);
    this.held = message.evaluated ?? this.held;
    if (!message.held && message.groups) this.newest = Math.max(this.newest ?? 0, message.step);
  }

  takeBreaks(marks) {
    const breaks = marks.filter(([, kind]) => kind === "v").map(([step]) => step);
    if (String(breaks) === String(this.breaks)) return;
    this.breaks = breaks;
    for (const [name, series] of this.series) if (name.includes("reward")) series.resmooth(this.smoothing, breaks);
  }

  takeSpans(spans) {
    this.spans = spans;
    for (const [name, series] of this.series) series.setSpans(spans[name] ?? null);
  }

  takeDelta(message) {
    for (const [name, [offset, steps, values]] of Object.entries(message.s)) {
      this.takePoints(name, offset, steps, values.map(parseNumber));
    }
    if (message.at) this.latency = Date.now() - message.at;
    if (message.step !== undefined) this.status = { ...this.status, step: message.step };
  }

  takeColumns(message, [steps, values]) {
    if (message.new) this.series.clear();
    this.takePoints(message.name, message.o, columnOf(Uint32Array, steps), columnOf(Float32Array, values));
  }

  takePoints(name, offset, steps, values) {
    const series = this.get(name);
    if (offset === 0) series.clear();
    if (offset === series.n) series.append(steps, values);
    else this.hello();
  }

  takeStatus(message) {
    this.status = message;
    if (message.n > this.points) this.hello();
  }
}

// A column of a binary message; copied, since its bytes need not be aligned.
function columnOf(Type, view) {
  return new Type(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

// Ties a widget's model to a store, once per page; returns the store.
function connect(model) {
  const store = new Store((content) => model.send(content), model.get("smoothing") ?? 0);
  model.on("change:smoothing", () => store.setSmoothing(model.get("smoothing")));
  return tie(model, store);
}

// Sets a public trait, here and in the kernel.
function settle(model, name, value) {
  if (model.get(name) === value) return;
  model.set(name, value);
  model.save_changes();
}

export { Series, Store, connect, parseNumber, settle };
