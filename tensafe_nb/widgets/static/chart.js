// A curve: canvas for the series, SVG for axes and cursor, HTML for the legend. Raw faint, smoothed bold, held-out dashed.

const MARGIN = { left: 52, right: 14, top: 10, bottom: 26 };
const SVG = "http://www.w3.org/2000/svg";

// Round positions for about `count` ticks between two numbers.
function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.75);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return { ticks, step };
}

// As many decimals as the distance between ticks needs.
function tickText(value, step) {
  if (value !== 0 && (Math.abs(value) >= 1e6 || step < 1e-4)) return value.toExponential(1);
  return (Math.abs(value) < step / 1e6 ? 0 : value).toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
}

function numberText(value) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "not a number" : value > 0 ? "+∞" : "−∞";
  const size = Math.abs(value);
  return size !== 0 && (size >= 1e5 || size < 1e-3) ? value.toExponential(2) : value.toPrecision(4);
}

// Least and greatest finite value of several columns; a flat or missing curve gets some room.
function extent(columns) {
  let low = Infinity;
  let high = -Infinity;
  for (const [values, n] of columns) {
    for (let i = 0; i < n; i++) {
      if (Number.isFinite(values[i])) {
        if (values[i] < low) low = values[i];
        if (values[i] > high) high = values[i];
      }
    }
  }
  if (low > high) return [0, 1];
  return low === high ? [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1] : [low, high];
}

// Points of a line, at most the least and the greatest value per pixel column: no spike is ever lost.
// Non-finite values are stepped over. Returns x, y, x, y, …
function columnPath(steps, values, n, toX, toY) {
  const path = [];
  let column = NaN;
  let low = -1;
  let high = -1;
  const finish = () => {
    if (low < 0) return;
    for (const i of low === high ? [low] : low < high ? [low, high] : [high, low]) {
      path.push(toX(steps[i]), toY(values[i]));
    }
  };
  for (let i = 0; i < n; i++) {
    if (!Number.isFinite(values[i])) continue;
    const here = Math.round(toX(steps[i]) * 2);
    if (here !== column) {
      finish();
      column = here;
      low = high = i;
    } else if (values[i] < values[low]) low = i;
    else if (values[i] > values[high]) high = i;
  }
  finish();
  return path;
}

// Index of the point whose step is closest.
function nearest(steps, n, step) {
  let low = 0;
  let high = n - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
}

// A curve in words, for who does not see it.
function summary(name, series) {
  const { n, smooth, steps, bad } = series;
  let first = 0;
  while (first < n && !Number.isFinite(smooth[first])) first++;
  if (first === n) return `${name}: no values yet`;
  const [from, to] = [smooth[first], smooth[n - 1]];
  const [low, high] = extent([[smooth, n]]);
  const tail = to - smooth[Math.max(first, n - 21)];
  const trend = Math.abs(tail) < 0.02 * (high - low) ? "flat" : tail < 0 ? "falling" : "rising";
  const moved = to < from ? "fell" : to > from ? "rose" : "stayed";
  const last = n - first > 20 ? `, last 20 ${trend}` : "";
  const broken = bad ? `, ${bad} values not finite` : "";
  const over = `from ${numberText(from)} to ${numberText(to)} over ${steps[n - 1] - steps[first] + 1} steps`;
  return `${name} ${moved} ${over}${last}${broken}`;
}

function make(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

function makeSvg(tag, attributes, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  return node;
}

// One curve of a store. It draws once per frame at most, and only while it is on the screen.
class Chart {
  constructor(store) {
    this.store = store;
    this.cursor = null; // index of the point looked at
    this.visible = true;
    this.frame = 0;
    this.build();
    this.listen();
  }

  build() {
    this.el = make("div", "tsnb-chart");
    this.legend = make("div", "tsnb-legend");
    this.plot = make("div", "tsnb-plot");
    this.plot.tabIndex = 0;
    this.plot.setAttribute("role", "img");
    this.canvas = make("canvas");
    this.axes = makeSvg("svg", { "aria-hidden": "true" });
    this.focus = makeSvg("g", { class: "tsnb-focus" });
    this.empty = make("div", "tsnb-empty", "The curve begins with the first step.");
    this.plot.append(this.canvas, this.axes, this.empty);
    this.el.append(this.legend, this.plot);
  }

  listen() {
    const redraw = () => this.schedule();
    this.sized = new ResizeObserver(redraw);
    this.sized.observe(this.plot);
    this.seen = new IntersectionObserver(([entry]) => {
      this.visible = entry.isIntersecting;
      redraw();
    });
    this.seen.observe(this.plot);
    this.themed = new MutationObserver(() => requestAnimationFrame(redraw)); // a canvas inherits no colours
    this.themed.observe(document.body, { attributes: true });
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.look(null));
    this.plot.addEventListener("focus", () => this.describe());
    this.plot.addEventListener("blur", () => this.look(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
  }

  destroy() {
    cancelAnimationFrame(this.frame);
    for (const observer of [this.sized, this.seen, this.themed]) observer.disconnect();
  }

  get name() {
    return this.store.status.curve || "loss";
  }

  get series() {
    return this.store.get(this.name).current;
  }

  get heldOut() {
    return this.store.get(`eval/${this.name}`).current;
  }

  schedule() {
    if (!this.frame && this.visible) {
      this.frame = requestAnimationFrame(() => {
        this.frame = 0;
        this.draw();
      });
    }
  }

  describe() {
    this.plot.setAttribute("aria-label", `${summary(this.name, this.series)}. Arrow keys read the points.`);
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.plot;
    if (!width || !height) return;
    this.scale(width, height);
    this.drawAxes(width, height);
    this.drawSeries(width, height);
    this.drawFocus(height);
    this.drawLegend();
    this.empty.hidden = this.series.n + this.heldOut.n > 0;
  }

  scale(width, height) {
    const [main, held] = [this.store.get(this.name), this.heldOut]; // all there is, what was abandoned too
    const [left, right] = extent([[main.steps, main.n], [held.steps, held.n]]);
    const [low, high] = extent([[main.values, main.n], [held.values, held.n]]);
    const pad = (high - low) * 0.06;
    const [x0, x1] = [MARGIN.left, width - MARGIN.right];
    const [y0, y1] = [height - MARGIN.bottom, MARGIN.top];
    Object.assign(this, { left, right, low: low - pad, high: high + pad });
    this.toX = (step) => x0 + ((step - left) / (right - left)) * (x1 - x0);
    this.toY = (value) => y0 + ((value - this.low) / (this.high - this.low)) * (y1 - y0);
    this.toStep = (x) => left + ((x - x0) / (x1 - x0)) * (right - left);
  }

  drawAxes(width, height) {
    const bottom = height - MARGIN.bottom;
    const parts = [];
    const upright = niceTicks(this.low, this.high, height / 46);
    for (const tick of this.series.n + this.heldOut.n ? upright.ticks : []) {
      const y = this.toY(tick);
      parts.push(makeSvg("line", { class: "tsnb-grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }));
      parts.push(makeSvg("text", { x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, tickText(tick, upright.step)));
    }
    const across = niceTicks(this.left, this.right, width / 110);
    for (const tick of this.series.n + this.heldOut.n ? across.ticks : []) {
      if (!Number.isInteger(tick)) continue;
      parts.push(makeSvg("text", { x: this.toX(tick), y: bottom + 18, "text-anchor": "middle" }, String(tick)));
    }
    parts.push(makeSvg("line", { class: "tsnb-base", x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom, y2: bottom }));
    parts.push(...this.badTicks(bottom), this.focus);
    this.axes.replaceChildren(...parts);
  }

  badTicks(bottom) {
    const { steps, values, n, bad } = this.series;
    const ticks = [];
    for (let i = 0, last = NaN; bad && i < n; i++) {
      const x = Math.round(this.toX(steps[i]));
      if (Number.isFinite(values[i]) || x === last) continue;
      last = x;
      ticks.push(makeSvg("path", { class: "tsnb-bad", d: `M${x - 4},${bottom}l4,-9l4,9z` }));
    }
    return ticks;
  }

  drawSeries(width, height) {
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.lineJoin = "round";
    const style = getComputedStyle(this.el);
    const [main, held] = [style.getPropertyValue("--tsnb-c0").trim(), style.getPropertyValue("--tsnb-c1").trim()];
    const smoothing = this.store.smoothing > 0;
    const { steps, values, smooth, n, abandoned } = this.series;
    for (const piece of abandoned) {
      const [at, was] = [piece.map(([step]) => step), piece.map(([, value]) => value)];
      this.line(pen, at, was, at.length, { color: main, alpha: 0.25, width: 1 });
    }
    this.line(pen, steps, values, n, { color: main, alpha: smoothing ? 0.5 : 1, width: smoothing ? 1 : 2 });
    if (smoothing) this.line(pen, steps, smooth, n, { color: main, alpha: 1, width: 2.25 });
    this.line(pen, this.heldOut.steps, this.heldOut.values, this.heldOut.n, {
      color: held, alpha: 1, width: 1.75, dash: [6, 4], dots: true,
    });
  }

  line(pen, steps, values, n, { color, alpha, width, dash = [], dots = false }) {
    const path = columnPath(steps, values, n, this.toX, this.toY);
    Object.assign(pen, { strokeStyle: color, fillStyle: color, globalAlpha: alpha, lineWidth: width });
    pen.setLineDash(dash);
    pen.beginPath();
    for (let i = 0; i < path.length; i += 2) pen.lineTo(path[i], path[i + 1]);
    pen.stroke();
    pen.setLineDash([]);
    for (let i = 0; (dots ? path.length < 160 : path.length === 2) && i < path.length; i += 2) {
      pen.beginPath();
      pen.arc(path[i], path[i + 1], 3, 0, 7);
      pen.fill();
    }
  }

  drawFocus(height) {
    const { steps, values, smooth, n } = this.series;
    this.focus.replaceChildren();
    if (this.cursor === null || !n) return;
    const i = Math.min(this.cursor, n - 1);
    const x = this.toX(steps[i]);
    this.focus.append(makeSvg("line", { x1: x, x2: x, y1: MARGIN.top, y2: height - MARGIN.bottom }));
    for (const value of [values[i], smooth[i]]) {
      if (Number.isFinite(value)) this.focus.append(makeSvg("circle", { cx: x, cy: this.toY(value), r: 3.5 }));
    }
  }

  drawLegend() {
    const { steps, values, smooth, n, bad } = this.series;
    const i = this.cursor === null ? n - 1 : Math.min(this.cursor, n - 1);
    const parts = [];
    if (n) {
      parts.push(entry("tsnb-raw", this.name, numberText(values[i])));
      if (this.store.smoothing > 0) parts.push(entry("tsnb-smooth", "smoothed", numberText(smooth[i])));
    }
    const held = this.heldOut;
    if (held.n) {
      const k = this.cursor === null ? held.n - 1 : nearest(held.steps, held.n, n ? steps[i] : 0);
      parts.push(entry("tsnb-held", `eval/${this.name}`, `${numberText(held.values[k])} at ${held.steps[k]}`));
    }
    if (bad) parts.push(make("span", "tsnb-bad-note", `▲ ${bad} not finite`));
    const where = n ? `${this.cursor === null ? "latest: " : ""}step ${steps[i]}` : "";
    parts.push(make("span", "tsnb-where", where));
    this.legend.replaceChildren(...parts);
  }

  point(event) {
    const { n, steps } = this.series;
    if (!n || !this.toStep) return;
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    this.look(nearest(steps, n, this.toStep(x)));
  }

  key(event) {
    const { n } = this.series;
    const page = Math.max(1, Math.round(n / 10));
    const at = this.cursor ?? n - 1;
    const moves = {
      ArrowLeft: at - 1, ArrowRight: at + 1, PageDown: at - page, PageUp: at + page, Home: 0, End: n - 1, Escape: null,
    };
    if (!n || !(event.key in moves)) return;
    event.preventDefault();
    const target = moves[event.key];
    this.look(target === null ? null : Math.max(0, Math.min(n - 1, target)), true);
  }

  look(index, spoken = false) {
    this.cursor = index;
    this.schedule();
    if (spoken && index !== null) {
      const { steps, values } = this.series;
      this.onSpeak?.(`step ${steps[index]}, ${this.name} ${numberText(values[index])}`);
    }
  }
}

function entry(kind, name, value) {
  const part = make("span", `tsnb-entry ${kind}`);
  part.append(make("i"), make("span", "", name), make("b", "", value));
  return part;
}

export { Chart, columnPath, extent, make, nearest, niceTicks, numberText, summary, tickText };
