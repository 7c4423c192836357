// A chart: canvas for the curves, SVG for axes, marks and cursor, HTML for the legend. Raw faint, smoothed bold.
import { settle } from "./wire.js";
import { fill, make, makeButton, makeSvg, numberText, scaled } from "./page.js";

const MARGIN = { left: 52, right: 14, top: 14, bottom: 24 };
const SIGNS = { c: "◆", f: "⎇", v: "▾" };
const MEANING = { c: "checkpoint", f: "branch", v: "reward version" };
const FLAT = 0.02; // a range is at least this share of its greatest value high: noise is not blown up to a mountain range

// Round positions for about `count` ticks between two numbers.
function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.75);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return { ticks, step };
}

// Powers of ten between two numbers, with 2 and 5 where there are few; round numbers where there are none.
function logTicks(low, high, count) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    for (const m of Math.log10(high / low) < 2 ? [1, 2, 5] : [1]) ticks.push(m * 10 ** power);
  }
  const inside = ticks.filter((tick) => tick >= low && tick <= high);
  return inside.length > 1 ? inside.filter((_, i) => i % Math.ceil(inside.length / count) === 0) : niceTicks(low, high, count).ticks;
}

// As many decimals as the distance between ticks needs.
function tickText(value, step) {
  if (value !== 0 && step < 1e-4) return value.toExponential(1);
  if (Math.abs(value) >= 1e4) return scaled(value, (size) => String(+size.toFixed(3)));
  return (Math.abs(value) < step / 1e6 ? 0 : value).toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
}

function secondsText(value) {
  return value < 60 ? `${+value.toFixed(1)} s` : value < 3600 ? `${+(value / 60).toFixed(1)} min` : `${+(value / 3600).toFixed(1)} h`;
}

// First index whose value is not below x.
function lowerBound(values, n, x) {
  let low = 0;
  for (let high = n; low < high; ) {
    const middle = (low + high) >> 1;
    if (values[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Index of the closest value.
function nearest(values, n, x) {
  const at = Math.min(n - 1, lowerBound(values, n, x));
  return at > 0 && x - values[at - 1] < values[at] - x ? at - 1 : at;
}

// Least and greatest finite value above `floor` of some stretches; null without any.
function extent(stretches, floor = -Infinity) {
  let low = Infinity;
  let high = -Infinity;
  for (const [values, from, to] of stretches) {
    for (let i = from; i < to; i++) {
      const value = values[i];
      if (value > floor && value < Infinity) {
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
  }
  return low > high ? null : [low, high];
}

// The range that is drawn, of least and greatest value: where they hardly differ, so much that they look alike.
function rangeOf(found, log = false, share = FLAT) {
  const [low, high] = found ?? (log ? [1, 10] : [0, 1]);
  if (log) return high / low > 1 + share ? [low, high] : [low / 2, high * 2];
  const least = Math.max(Math.abs(low), Math.abs(high)) * share;
  if (!least) return [0, 1];
  const more = Math.max(0, least - (high - low)) / 2;
  return [low - more, high + more];
}

// Mean ± spread, point by point; both are ordered by step.
function bandOf(series, spread) {
  const [low, high] = [new Float64Array(series.n), new Float64Array(series.n)];
  for (let i = 0, k = 0; i < series.n; i++) {
    while (k < spread.n - 1 && spread.steps[k] < series.steps[i]) k++;
    const own = spread.steps[k] === series.steps[i] ? spread.values[k] : NaN;
    low[i] = series.values[i] - own;
    high[i] = series.values[i] + own;
  }
  return { low, high };
}

// Points of a line, at most the least and the greatest value per half pixel: no spike is ever lost. Values that are not
// finite, or not above `floor`, are stepped over. `x * a + b` is a position. Returns x, y, x, y, …
function columnPath(xs, values, from, to, { a, b }, toY, floor = -Infinity) {
  const path = [];
  const [scale, shift] = [2 * a, 2 * b + 0.5];
  let column = NaN;
  let [low, high, least, most] = [-1, -1, 0, 0];
  const put = (i) => path.push(xs[i] * a + b, toY(values[i]));
  const finish = () => {
    if (low < 0) return;
    put(Math.min(low, high));
    if (low !== high) put(Math.max(low, high));
  };
  for (let i = from; i < to; i++) {
    const value = values[i];
    if (!(value > floor && value < Infinity)) continue;
    const here = Math.floor(xs[i] * scale + shift);
    if (here !== column) {
      finish();
      column = here;
      low = high = i;
      least = most = value;
    } else if (value < least) {
      least = value;
      low = i;
    } else if (value > most) {
      most = value;
      high = i;
    }
  }
  finish();
  return path;
}

// Where the points of a series lie on an axis: their steps, or the tokens or seconds that `ruler` holds for them.
function positions(series, ruler) {
  if (!ruler?.n) return series.steps;
  const key = `${series.n}/${ruler.n}`;
  if (series.ruled !== key) {
    series.ruled = key;
    series.xs = new Float64Array(series.n);
    for (let i = 0, j = 0; i < series.n; i++) {
      while (j < ruler.n - 1 && ruler.steps[j] < series.steps[i]) j++;
      series.xs[i] = ruler.values[j];
    }
  }
  return series.xs;
}

// A curve in words, for who does not see it.
function summary(name, series) {
  const { n, smooth, steps, bad } = series;
  let first = 0;
  while (first < n && !Number.isFinite(smooth[first])) first++;
  if (first === n) return `${name}: no values yet`;
  const [from, to] = [smooth[first], smooth[n - 1]];
  const [low, high] = extent([[smooth, 0, n]]);
  const tail = to - smooth[Math.max(first, n - 21)];
  const trend = Math.abs(tail) < 0.02 * (high - low) ? "flat" : tail < 0 ? "falling" : "rising";
  const moved = to < from ? "fell" : to > from ? "rose" : "stayed";
  const last = n - first > 20 ? `, last 20 ${trend}` : "";
  const broken = bad ? `, ${bad} values not finite` : "";
  const over = `from ${numberText(from)} to ${numberText(to)} over ${steps[n - 1] - steps[first] + 1} steps`;
  return `${name} ${moved} ${over}${last}${broken}`;
}

// What all charts of a view look at: the same window, the same step.
class Lens {
  constructor() {
    this.from = this.to = this.step = null;
    this.listeners = new Set();
  }

  set(changes) {
    Object.assign(this, changes);
    for (const listener of this.listeners) listener();
  }
}

// One chart. `spec`: title, lines of { name, label, colour, dash, dots, smooth, spread (a name) }, band (the first line's spread), marks, range.
// It draws once per frame at most, and only while it is on the screen.
class Chart {
  constructor(store, model, lens, spec) {
    Object.assign(this, { store, model, lens, spec, visible: true, frame: 0, drag: null, hidden: new Set(), entries: new Map() });
    this.build();
    this.listen();
  }

  build() {
    this.el = make("div", `tsnb-chart${this.spec.small ? " tsnb-small" : ""}`);
    this.legend = make("div", "tsnb-legend");
    this.heading = make("b", "tsnb-title", this.spec.title ?? "");
    this.bandEntry = make("span", "tsnb-entry");
    this.bandEntry.append(make("i", "tsnb-swatch"), make("span", "", this.spec.bandText ?? "± spread within a group"));
    this.signs = make("span", "tsnb-where tsnb-signs");
    this.broken = make("span", "tsnb-bad-note");
    this.below = make("span", "tsnb-where");
    this.where = make("span", "tsnb-where tsnb-at-step");
    this.plot = make("div", "tsnb-plot");
    this.plot.tabIndex = 0;
    this.plot.setAttribute("role", "application"); // its keys are its own: a screen reader passes them on
    this.plot.setAttribute("aria-roledescription", "chart");
    this.describe();
    this.canvas = make("canvas");
    this.axes = makeSvg("svg", { "aria-hidden": "true" });
    this.empty = make("div", "tsnb-empty", this.spec.small ? "no values yet" : "The curve begins with the first step.");
    this.plot.append(this.canvas, this.axes, this.empty);
    this.el.append(this.legend, this.plot);
  }

  listen() {
    const redraw = () => this.schedule();
    this.lens.listeners.add(redraw);
    this.leave = () => this.lens.listeners.delete(redraw);
    this.sized = new ResizeObserver(redraw);
    this.sized.observe(this.plot);
    this.seen = new IntersectionObserver(([entry]) => {
      this.visible = entry.isIntersecting;
      redraw();
    });
    this.seen.observe(this.plot);
    this.themed = new MutationObserver(() => requestAnimationFrame(redraw)); // a canvas inherits no colours
    this.themed.observe(document.body, { attributes: true });
    this.media = ["(forced-colors: active)", "(prefers-color-scheme: dark)"].map((query) => matchMedia(query));
    for (const query of this.media) query.addEventListener("change", (this.recolour = redraw));
    const on = (name, handler, options) => this.plot.addEventListener(name, handler, options);
    on("pointerdown", (event) => this.press(event));
    on("pointermove", (event) => this.move(event));
    on("pointerup", (event) => this.release(event));
    on("pointerleave", () => this.look(null));
    on("dblclick", () => this.lens.set({ from: null, to: null }));
    on("wheel", (event) => this.wheel(event), { passive: false });
    on("focus", () => this.describe());
    on("blur", () => this.look(null));
    on("keydown", (event) => this.key(event));
  }

  destroy() {
    cancelAnimationFrame(this.frame);
    this.leave();
    for (const observer of [this.sized, this.seen, this.themed]) observer.disconnect();
    for (const query of this.media) query.removeEventListener("change", this.recolour);
  }

  get main() {
    return this.store.get(this.spec.lines[0].name).current;
  }

  // Whether a click on a point leads anywhere.
  get opens() {
    return this.store.newest !== undefined;
  }

  get log() {
    return this.spec.log === "always" || Boolean(this.spec.log && this.model.get("log_scale"));
  }

  ruler(line) {
    const axis = this.model.get("x_axis");
    return axis === "step" ? null : this.store.get(`${line.name.match(/^\d+:/)?.[0] ?? ""}~${axis}`).current;
  }

  xsOf(series, line) {
    return positions(series, this.ruler(line));
  }

  xOf(step) {
    const ruler = this.ruler(this.spec.lines[0]);
    return ruler?.n ? ruler.values[Math.min(ruler.n - 1, lowerBound(ruler.steps, ruler.n, step))] : step;
  }

  schedule() {
    this.unseen ||= !this.visible;
    if (this.frame || !this.visible) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      const started = performance.now();
      this.draw();
      this.plot.dataset.ms = (performance.now() - started).toFixed(2);
    });
  }

  describe() {
    const said = this.spec.lines.map(({ name, label }) => [label || this.spec.title || name, this.store.get(name).current]);
    const words = said.filter(([, series], i) => !i || series.n).map(([name, series]) => summary(name, series));
    this.plot.setAttribute("aria-label", `${words.join(". ")}. Arrow keys read the points${this.opens ? ", Enter opens their samples" : ""}.`);
  }

  draw() {
    this.unseen = false;
    const { clientWidth: width, clientHeight: height } = this.plot;
    if (!width || !height) return;
    this.listed = this.spec.lines.map((line) => {
      const series = this.store.get(line.name).current;
      return { line, series, xs: this.xsOf(series, line) };
    });
    this.curves = this.listed.filter(({ line }) => !this.hidden.has(line.name));
    for (const curve of this.curves) {
      const name = curve.line.spread ?? (curve.line === this.spec.lines[0] ? this.spec.band : null);
      const spread = name && this.store.get(name).current;
      if (spread?.n) curve.band = bandOf(curve.series, spread);
    }
    this.empty.hidden = this.listed.some(({ series }) => series.n);
    this.scale(width, height);
    this.drawAxes(width, height);
    this.drawSeries(width, height);
    this.drawLegend();
  }

  // Where its lines begin and end on the axis. A small chart reaches as far as the large one that it is below.
  reach() {
    return this.spec.lines.map((line) => [line, this.store.get(line.name).current]).filter(([, series]) => series.n).flatMap(([line, series]) => {
      const xs = this.xsOf(series, line);
      return [xs[0], xs[series.n - 1], ...series.abandoned.map((piece) => this.xsOf(piece, line)[piece.n - 1])];
    });
  }

  // The window in units of the axis, and which points lie in it (one more on either side, so that lines go on).
  scale(width, height) {
    const drawn = this.curves.filter(({ series }) => series.n);
    const all = [...this.reach(), ...(this.over?.reach() ?? [])];
    let [left, right] = all.length ? [Math.min(...all), Math.max(...all)] : [0, 1];
    this.whole = [left, right];
    if (this.lens.from !== null) [left, right] = [this.lens.from, this.lens.to];
    if (left === right) [left, right] = [left - 0.5, right + 0.5];
    const floor = this.log ? 0 : -Infinity;
    for (const curve of drawn) {
      curve.from = Math.max(0, lowerBound(curve.xs, curve.series.n, left) - 1);
      curve.to = Math.min(curve.series.n, lowerBound(curve.xs, curve.series.n, right) + 2);
    }
    const stretches = drawn.flatMap(({ series, from, to, band }) => [
      [series.values, from, to], ...(band ? [[band.low, from, to], [band.high, from, to]] : []), ...(this.lens.from === null ? series.abandoned.map((p) => [p.values, 0, p.n]) : []),
    ]);
    const [low, high] = this.spec.range ?? rangeOf(extent(stretches, floor), this.log, this.lens.from === null ? FLAT : FLAT / 100);
    const [x0, x1, y0, y1] = [MARGIN.left, width - MARGIN.right, height - MARGIN.bottom, MARGIN.top];
    const a = (x1 - x0) / (right - left);
    const of = this.log ? Math.log10 : (value) => value;
    const pad = (of(high) - of(low)) * 0.06;
    const [bottom, span] = [of(low) - pad, of(high) - of(low) + 2 * pad];
    const back = this.log ? (value) => 10 ** value : (value) => value;
    Object.assign(this, { left, right, floor, low: back(bottom), high: back(bottom + span), across: { a, b: x0 - left * a } });
    this.toX = (x) => x * a + this.across.b;
    this.toY = (value) => y0 + ((of(value) - bottom) / span) * (y1 - y0);
    this.fromX = (position) => (position - this.across.b) / a;
  }

  drawAxes(width, height) {
    const bottom = height - MARGIN.bottom;
    const parts = [];
    const line = (x1, x2, y1, y2, name) => parts.push(makeSvg("line", { class: name, x1, x2, y1, y2 }));
    const text = (x, y, anchor, words) => parts.push(makeSvg("text", { x, y, "text-anchor": anchor }, words));
    if (this.empty.hidden) {
      const upright = niceTicks(this.low, this.high, height / 46);
      for (const tick of this.log ? logTicks(this.low, this.high, height / 30) : upright.ticks) {
        line(MARGIN.left, width - MARGIN.right, this.toY(tick), this.toY(tick), "tsnb-grid");
        text(MARGIN.left - 8, this.toY(tick) + 4, "end", this.log ? String(+tick.toPrecision(3)) : tickText(tick, upright.step));
      }
      const axis = this.model.get("x_axis");
      const flat = niceTicks(this.left, this.right, width / 110);
      for (const tick of flat.ticks) {
        const words = axis === "time" ? secondsText(tick) : tickText(tick, Math.max(1, flat.step));
        if (axis === "time" || Number.isInteger(tick)) text(this.toX(tick), bottom + 17, "middle", words);
      }
    }
    line(MARGIN.left, width - MARGIN.right, bottom, bottom, "tsnb-base");
    for (const { series, xs, from, to } of this.curves) {
      for (let i = from, last = NaN; series.bad && i < to; i++) {
        const x = Math.round(this.toX(xs[i]));
        if (Number.isFinite(series.values[i]) || x === last) continue;
        last = x;
        parts.push(makeSvg("path", { class: "tsnb-bad", d: `M${x - 4},${bottom}l4,-9l4,9z` }));
      }
    }
    for (const [step, kind] of this.marks) {
      const x = this.toX(this.xOf(step));
      if (x < MARGIN.left - 1 || x > width - MARGIN.right + 1) continue;
      line(x, x, MARGIN.top, bottom, `tsnb-mark tsnb-mark-${kind}`);
      text(x, kind === "f" ? bottom - 3 : MARGIN.top - 3, "middle", SIGNS[kind]);
    }
    const chosen = this.model.get("selected_step");
    if (chosen != null) line(this.toX(this.xOf(chosen)), this.toX(this.xOf(chosen)), MARGIN.top, bottom, "tsnb-chosen");
    this.focus = makeSvg("g", { class: "tsnb-focus" });
    parts.push(this.focus);
    this.axes.replaceChildren(...parts);
    this.drawFocus(height);
  }

  get marks() {
    return (this.store.parts.marks?.marks ?? []).filter(([, kind]) => (kind === "v" ? this.spec.breaks : this.spec.marks));
  }

  drawFocus(height) {
    const { step } = this.lens;
    if (this.drag?.moved) {
      const [x, to] = [this.drag.x, this.drag.to].sort((one, other) => one - other);
      this.focus.append(makeSvg("rect", { x, width: to - x, y: MARGIN.top, height: height - MARGIN.top - MARGIN.bottom }));
    } else if (step !== null && this.empty.hidden) {
      const x = this.toX(this.xOf(step));
      this.focus.append(makeSvg("line", { x1: x, x2: x, y1: MARGIN.top, y2: height - MARGIN.bottom }));
      for (const { series } of this.curves) {
        const i = nearest(series.steps, series.n, step);
        if (!series.n || series.steps[i] !== step || !(series.values[i] > this.floor && series.values[i] < Infinity)) continue;
        this.focus.append(makeSvg("circle", { cx: x, cy: this.toY(series.values[i]), r: 3.5 }));
      }
    }
  }

  drawSeries(width, height) {
    const ratio = window.devicePixelRatio || 1;
    const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== wide) this.canvas.width = wide;
    if (this.canvas.height !== high) this.canvas.height = high;
    const pen = this.canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.save();
    pen.beginPath();
    pen.rect(MARGIN.left - 4, MARGIN.top - 4, width - MARGIN.left - MARGIN.right + 8, height - MARGIN.top - MARGIN.bottom + 5);
    pen.clip();
    pen.lineJoin = "round";
    const ink = (colour = 0) => {
      this.canvas.style.color = `var(--tsnb-c${colour})`; // resolved: a canvas keeps the system's colours as they once were
      return getComputedStyle(this.canvas).color;
    };
    const smoothing = this.store.smoothing > 0;
    const shy = this.curves.filter(({ line }) => line.smooth).length > 1 ? 0.3 : 0.5; // of raw values beneath smoothed ones
    for (const curve of this.curves) {
      const { line, series, xs } = curve;
      if (!series.n) continue;
      const colour = ink(line.colour);
      for (const piece of series.abandoned) {
        this.stroke(pen, { series: piece, xs: this.xsOf(piece, line), from: 0, to: piece.n }, piece.values, { colour, alpha: 0.3, width: 1 });
      }
      if (curve.band) this.drawBand(pen, curve, colour);
      const faint = smoothing && line.smooth && series.n > 1;
      const raw = faint ? { colour, alpha: shy, width: 1 } : { ...line, colour, alpha: 1, width: 1.75 };
      this.stroke(pen, curve, series.values, raw);
      if (faint) this.stroke(pen, curve, series.smooth, { ...line, colour, alpha: 1, width: 2.25 });
    }
    pen.restore();
  }

  // Draws a line in as many pieces as different things were measured.
  stroke(pen, { series, xs, from, to }, values, { colour, alpha, width, dash = [], dots = false }) {
    Object.assign(pen, { strokeStyle: colour, fillStyle: colour, globalAlpha: alpha, lineWidth: width });
    pen.setLineDash(dash);
    const cuts = series.breaks.map((step) => lowerBound(series.steps, series.n, step)).filter((i) => i > from && i < to);
    for (const [k, start] of [from, ...cuts].entries()) {
      const path = columnPath(xs, values, start, cuts[k] ?? to, this.across, this.toY, this.floor);
      pen.beginPath();
      for (let i = 0; i < path.length; i += 2) pen.lineTo(path[i], path[i + 1]);
      pen.stroke();
      for (let i = 0; (dots ? path.length < 160 : path.length === 2) && i < path.length; i += 2) {
        pen.beginPath();
        pen.arc(path[i], path[i + 1], 2.5, 0, 7);
        pen.fill();
      }
    }
    pen.setLineDash([]);
  }

  // Mean ± spread as an area behind the line.
  drawBand(pen, { xs, from, to, band }, colour) {
    const edge = (values) => columnPath(xs, values, from, to, this.across, this.toY, this.floor);
    const [above, beneath] = [edge(band.high), edge(band.low)];
    Object.assign(pen, { fillStyle: colour, globalAlpha: 0.12 });
    pen.beginPath();
    for (let i = 0; i < above.length; i += 2) pen.lineTo(above[i], above[i + 1]);
    for (let i = beneath.length - 2; i >= 0; i -= 2) pen.lineTo(beneath[i], beneath[i + 1]);
    pen.fill();
  }

  // What is drawn, in its order and its look; of several lines a click hides one. What is off has no entry.
  drawLegend() {
    const there = this.listed.filter(({ series }) => series.n);
    const { step } = this.lens;
    let [below, bad] = [0, 0];
    for (const { line, series } of there) {
      if (this.hidden.has(line.name)) continue;
      bad += series.bad;
      for (let k = 0; this.log && k < series.n; k++) below += series.values[k] <= 0;
    }
    const kinds = [...new Set(this.marks.map(([, kind]) => kind))];
    fill(this.signs, kinds.map((kind) => `${SIGNS[kind]} ${MEANING[kind]}`).join("  "));
    fill(this.broken, bad ? `▲ ${bad} not finite` : "");
    fill(this.below, below ? `${below} values ≤ 0 not drawn` : "");
    if (!this.spec.small && this.main.n) {
      const at = step ?? this.main.steps[this.main.n - 1];
      const marks = this.marks.filter(([where]) => where === step).map(([, kind, what]) => ` · ${SIGNS[kind]} ${MEANING[kind]} ${what.slice(0, 12)}`);
      fill(this.where, `${step === null ? "latest: " : ""}step ${at}${marks.join("")}`);
    }
    const entries = there.map((curve) => this.entry(curve, step, there.length > 1));
    if (this.curves.some(({ band }) => band)) entries.splice(this.spec.bandText ? entries.length : 1, 0, this.bandEntry);
    const parts = [this.heading, ...entries, this.signs, this.broken, this.below, this.where].filter((part) => part.childNodes.length);
    if (parts.length !== this.legend.children.length || parts.some((part, i) => part !== this.legend.children[i])) this.legend.replaceChildren(...parts);
  }

  entry({ line, series }, step, several) {
    const key = `${line.name}/${several}`;
    if (!this.entries.has(key)) this.entries.set(key, this.newEntry(line, several));
    const { el, value, more } = this.entries.get(key);
    const i = step === null ? series.n - 1 : nearest(series.steps, series.n, step);
    const digits = this.spec.small ? 3 : 4;
    const smooth = this.store.smoothing > 0 && line.smooth && !this.spec.small ? ` (${numberText(series.smooth[i], digits)} smoothed)` : "";
    const elsewhere = step !== null && series.steps[i] !== step;
    fill(value, numberText(series.values[i], digits));
    fill(more, smooth + (elsewhere || (line.dots && !this.spec.small) ? ` at ${series.steps[i]}` : ""));
    if (several) el.setAttribute("aria-pressed", String(!this.hidden.has(line.name)));
    return el;
  }

  newEntry(line, several) {
    const name = line.label ?? line.name;
    const el = several ? makeButton("", () => this.toggle(line.name), `${name}: a click hides the line or shows it`) : make("span");
    el.className = "tsnb-entry";
    const sample = makeSvg("svg", { width: 24, height: 8, "aria-hidden": "true" });
    sample.style.color = `var(--tsnb-c${line.colour ?? 0})`;
    sample.append(makeSvg("line", { x1: 0, x2: 24, y1: 4, y2: 4, stroke: "currentColor", "stroke-width": 2.5, "stroke-dasharray": (line.dash ?? []).join(" ") }));
    if (line.dots) sample.append(makeSvg("circle", { cx: 12, cy: 4, r: 3, fill: "currentColor" }));
    const [value, more] = [make("b"), make("span", "tsnb-more-of-entry")];
    el.append(sample, make("span", "tsnb-name", name), value, more);
    return { el, value, more };
  }

  toggle(name) {
    if (!this.hidden.delete(name)) this.hidden.add(name);
    this.schedule();
  }

  at(event) {
    return event.clientX - this.plot.getBoundingClientRect().left;
  }

  press(event) {
    if (event.button) return;
    this.drag = { x: this.at(event), to: this.at(event), moved: false, window: [this.left, this.right] };
    this.plot.setPointerCapture?.(event.pointerId);
  }

  move(event) {
    const { drag } = this;
    if (this.unseen) this.draw(); // it was out of the window, and its scale is of then
    if (!this.toX) return;
    if (drag) {
      drag.to = this.at(event);
      drag.moved ||= Math.abs(drag.to - drag.x) > 4;
      if (drag.moved && event.shiftKey) this.slide((drag.x - drag.to) / this.across.a, drag.window);
      drag.pan = event.shiftKey;
      return this.schedule();
    }
    const { n, steps } = this.main;
    if (n) this.look(steps[nearest(this.xsOf(this.main, this.spec.lines[0]), n, this.fromX(this.at(event)))]);
  }

  release(event) {
    const { drag } = this;
    this.drag = null;
    if (!drag) return;
    if (!drag.moved) this.choose();
    else if (!drag.pan && !event.shiftKey) this.window(this.fromX(drag.x), this.fromX(drag.to));
    this.schedule();
  }

  // Chooses the step under the cursor, whose samples are opened where there are any.
  choose() {
    if (this.lens.step === null) return;
    settle(this.model, "selected_step", this.lens.step);
    this.onChoose?.();
  }

  window(one, other) {
    const [from, to] = [Math.min(one, other), Math.max(one, other)];
    const [left, right] = this.whole;
    const all = from <= left && to >= right;
    if (to > from) this.lens.set(all ? { from: null, to: null } : { from, to });
  }

  slide(by, [left, right] = [this.left, this.right]) {
    const [first, last] = this.whole;
    const kept = Math.max(first - left, Math.min(last - right, by));
    if (this.lens.from !== null) this.lens.set({ from: left + kept, to: right + kept });
  }

  zoom(factor, around = (this.left + this.right) / 2) {
    const [first, last] = this.whole;
    this.window(Math.max(first, around - (around - this.left) * factor), Math.min(last, around + (this.right - around) * factor));
  }

  // A page that scrolls past a chart must not be caught in it: only a chart in use takes the wheel.
  wheel(event) {
    if (!this.toX || !(event.ctrlKey || document.activeElement === this.plot)) return;
    event.preventDefault();
    this.zoom(event.deltaY > 0 ? 1.25 : 0.8, this.fromX(this.at(event)));
  }

  key(event) {
    const { n, steps } = this.main;
    if (!n || !this.toX || event.altKey || event.metaKey || event.ctrlKey) return;
    const at = this.lens.step === null ? n - 1 : nearest(steps, n, this.lens.step);
    const go = (i) => this.look(steps[Math.max(0, Math.min(n - 1, i))], true);
    const page = Math.max(1, Math.round(n / 10));
    const width = this.right - this.left;
    const keys = {
      ArrowLeft: () => (event.shiftKey ? this.slide(-width / 5) : go(at - 1)),
      ArrowRight: () => (event.shiftKey ? this.slide(width / 5) : go(at + 1)),
      PageDown: () => go(at - page), PageUp: () => go(at + page), Home: () => go(0), End: () => go(n - 1),
      "+": () => this.zoom(0.5, this.xOf(steps[at])), "=": () => this.zoom(0.5, this.xOf(steps[at])),
      "-": () => this.zoom(2), 0: () => this.lens.set({ from: null, to: null }),
      Enter: () => this.choose(), Escape: () => this.look(null),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }

  look(step, spoken = false) {
    if (step !== this.lens.step) this.lens.set({ step });
    if (!spoken || step === null) return;
    const { steps, values, n } = this.main;
    this.onSpeak?.(`step ${step}, ${this.spec.title || this.spec.lines[0].name} ${numberText(values[nearest(steps, n, step)])}`);
  }
}

export { Chart, Lens, bandOf, columnPath, extent, logTicks, lowerBound, nearest, niceTicks, positions, rangeOf, summary, tickText };
