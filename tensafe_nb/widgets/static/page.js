// What all parts of a page share: elements made of text, numbers in words, the line that answers whoever clicked.

const WAITING_MS = 1000;
const WAITING = "waiting for the running cell; ■ frees it";
const SVG = "http://www.w3.org/2000/svg";
// Joiners are seen where they join: within an emoji, and between letters of the scripts that are written with them.
const JOINS = /(?<=[\u2600-\u27bf\ufe0f\u{1f000}-\u{1faff}])\u200d(?=[\u2600-\u27bf\u{1f000}-\u{1faff}])|(?<=[\u0600-\u06ff\u0900-\u0dff])[\u200c\u200d](?=[\u0600-\u06ff\u0900-\u0dff])/u;
const UNSEEN = /[\0-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]/gu;
const JOINERS = new RegExp(`(?!${JOINS.source})[\\u200c\\u200d]`, "gu");

// Text as it is, with a visible code for what would be invisible or turn other text around; piece by piece, since a
// joiner may join what stands in two of them.
function plainPieces(pieces) {
  const code = (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  const idle = new Set(Array.from(pieces.join("").matchAll(JOINERS), ({ index }) => index));
  let at = 0;
  return pieces.map((piece) => {
    const from = at;
    at += piece.length;
    return piece.replace(/[\u200c\u200d]/g, (c, i) => (idle.has(from + i) ? code(c) : c)).replace(UNSEEN, code);
  });
}

function plainText(text) {
  return plainPieces([String(text)])[0];
}

function make(tag, className = "", text = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}

// Sets a text where it is another: whoever reads along is not disturbed.
function fill(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Gives each label that the glossary has a line for that line, to be read where the mouse rests.
function explain(root, { words = {} } = {}) {
  for (const label of root.querySelectorAll(".tsnb-title, .tsnb-name, [data-term]")) {
    const said = words[label.dataset.term ?? label.textContent];
    if (said) label.title = said;
  }
}

function makeSvg(tag, attributes, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  return node;
}

function makeButton(text, action, title = "") {
  const button = make("button", "", text);
  button.type = "button";
  if (title) button.title = title;
  button.addEventListener("click", () => action(button));
  return button;
}

// A button that acts on its second click, within four seconds of the first.
function makeSure(text, question, action) {
  return makeButton(text, (button) => {
    if (button.textContent === question) return action();
    button.textContent = question;
    setTimeout(() => (button.textContent = text), 4000);
  });
}

// An area that may have to be scrolled: reached and named for who has no mouse.
function scrollable(area, name) {
  area.tabIndex = 0;
  area.setAttribute("role", "region");
  area.setAttribute("aria-label", name);
}

// Marks an area as narrow where it is. (A container query would leave it without a width of its own beside others.)
function watchWidth(area, narrow) {
  new ResizeObserver(([{ contentRect }]) => area.classList.toggle("tsnb-narrow", contentRect.width < narrow)).observe(area);
}

function makeSelect(label, options, value, action) {
  const select = make("select");
  select.setAttribute("aria-label", label);
  for (const [key, text] of options) {
    const option = make("option", "", text);
    option.value = key;
    select.append(option);
  }
  select.value = value;
  select.addEventListener("change", () => action(select.value));
  return select;
}

// A large number with the letter of its thousands: k, M, G, T.
function scaled(value, text) {
  const power = Math.min(4, Math.floor(Math.log10(Math.abs(value)) / 3 + 1e-9));
  return `${text(value / 1000 ** power)}${["", "k", "M", "G", "T"][power]}`;
}

// Bytes in units.
function sizeText(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  const round = Number(bytes.toPrecision(3)); // 999,600 is 1.00 MB
  const power = Math.min(4, Math.floor(Math.log10(round) / 3 + 1e-9));
  return `${(round / 1000 ** power).toPrecision(3)} ${["", "k", "M", "G", "T"][power]}B`;
}

function numberText(value, digits = 4) {
  if (value == null) return "—";
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "not a number" : value > 0 ? "+∞" : "−∞";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e15 || size < 1e-3)) return value.toExponential(2);
  if (size >= 1e5) return scaled(value, (short) => short.toPrecision(Math.max(3, digits)));
  return size < 10 ** digits ? value.toPrecision(digits) : value.toFixed(0);
}

function signed(value) {
  return value == null ? "—" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
}

// The line that answers whoever clicked: refused, failed, waiting, done.
class Note {
  constructor(store) {
    this.store = store;
    this.el = make("div", "tsnb-note");
    this.el.setAttribute("role", "alert");
  }

  get waiting() {
    const { store } = this;
    return Math.max(...[...store.pending.values()].map((since) => store.now() - since), 0) > WAITING_MS;
  }

  update(failure = "", hint = "") {
    const { error, refusal, said } = this.store;
    const text = [failure, error, refusal, said, this.waiting ? WAITING : ""].filter(Boolean).join("\n") || hint || "";
    this.el.classList.toggle("tsnb-wrong", Boolean(failure || error));
    this.el.hidden = !text;
    if (this.el.textContent !== plainText(text)) this.el.textContent = plainText(text);
  }
}

export { Note, explain, fill, make, makeButton, makeSelect, makeSure, makeSvg, numberText, plainPieces, plainText, scaled, scrollable, signed, sizeText, watchWidth };
