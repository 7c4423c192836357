// A chat: what is typed goes to the kernel, which keeps the conversation; what comes back is shown piece by piece.
import { Line, tie } from "./line.js";
import { LAST_WORD, Place, asking } from "./place.js";
import { Note, fill, make, makeButton, makeSure, makeSvg, plainPieces, plainText, watchWidth } from "./page.js";

const THUMB = "M1.5 7h3v7h-3zM6 7l3-6c1.6 0 2.1 1.1 1.8 2.4L10.2 6H14c.7 0 1 .6.9 1.2l-1 5.4c-.2.9-.7 1.4-1.6 1.4H6z";
const LIKELY = [[0.5, "50 % and more"], [0.1, "10 to 50 %"], [0.01, "1 to 10 %"], [0, "less than 1 %"]];
const ENDS = { length: "cut at max new tokens", stopped: "stopped", stop_string: "stop string", fixed: "" };
const SETS = [
  ["temperature", "Temperature", { min: 0, max: 5, step: 0.1 }, "0 takes the most likely token"],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.05 }, "keeps the likeliest tokens that add up to this"],
  ["max_new_tokens", "Max new tokens", { min: 1, step: 1 }, "the longest answer"],
  ["seed", "Seed", { min: 0, step: 1 }, "the same answers again; empty: others each time"],
];

// What a page knows of a chat.
class ChatLine extends Line {
  constructor(send, now, later) {
    super(send, now, later);
    this.turns = new Map(); // number → { said, answers, seen: how often it changed }
    this.first = 0;
    this.settings = {};
    this.after = new Map(); // number of a command → what to do with its answer
  }

  get size() {
    return this.turns.size;
  }

  ask(what, more, after) {
    if (after) this.after.set(this.given + 1, after);
    this.command(what, more);
    if (this.cut) this.settled(this.given, this.refusal);
  }

  takeAnswer(message) {
    super.takeAnswer(message);
    this.settled(message.n, message.why);
  }

  settled(number, why) {
    this.after.get(number)?.(why);
    this.after.delete(number);
  }

  take(message) {
    const { t, i } = message;
    if (t === "status") this.status = message;
    else if (t === "settings") this.settings = message;
    else if (t === "first") this.first = message.first;
    else if (t === "rows") this.rows = message;
    else if (t === "turn") this.turns.set(i, { said: message.said, answers: [], seen: 0 });
    else if (t === "begin") {
      this.turns.clear();
      this.first = message.first;
    } else if (t === "cut") {
      for (const number of [...this.turns.keys()]) if (number >= message.n) this.turns.delete(number);
    } else if (t === "said") this.takePieces(this.turns.get(i), message);
  }

  takePieces(turn, { c, o, p, ...about }) {
    const pieces = o ? turn?.answers[c]?.pieces : [];
    if (!turn || pieces?.length !== o) return this.greet(); // something was missed
    pieces.push(...p);
    turn.answers[c] = { ...about, pieces };
    turn.seen++;
  }
}

// Of a piece: how likely its tokens were, and how that is said. Several tokens are one character, or a stop string's part.
function likely(logprobs) {
  const mean = logprobs.reduce((sum, value) => sum + value, 0) / (logprobs.length || 1);
  const p = Math.exp(mean);
  const share = p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 0.0001 ? `${(100 * p).toPrecision(2)} %` : "under 0.01 %";
  const logs = logprobs.map((value) => value.toFixed(2).replace("-", "−")).join(", ");
  return { level: LIKELY.findIndex(([least]) => p >= least), words: `probability ${share}, log-probability ${logs}` };
}

function quietButton(text, title, action) {
  const button = makeButton(text, action, title);
  button.className = "tsnb-quiet";
  if (!/\w/.test(text)) button.setAttribute("aria-label", title);
  return button;
}

function copyText(text, button) {
  const done = () => {
    const before = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = before), 1500);
  };
  if (navigator.clipboard) return void navigator.clipboard.writeText(text).then(done, () => {});
  const area = make("textarea"); // a page without https has no clipboard of its own
  area.value = text;
  button.after(area);
  area.select();
  if (document.execCommand("copy")) done();
  area.remove();
}

// A field to type into. JupyterLab would take Shift+Enter and others from it, whatever stands around it.
function makeField(tag, attributes = {}) {
  const field = Object.assign(make(tag), attributes);
  field.dataset.lmSuppressShortcuts = "true";
  return field;
}

// One answer, in one column.
class AnswerView {
  constructor(view, column) {
    Object.assign(this, { view, column, mode: "", words: [] });
    this.el = make("div", "tsnb-said");
    this.name = make("div", "tsnb-who");
    this.body = make("div", "tsnb-words");
    this.body.dir = "auto";
    this.note = make("div", "tsnb-where");
    this.tools = make("div", "tsnb-tools");
    this.thumbs = [true, false].map((good) => {
      const button = quietButton("", good ? "good answer" : "bad answer", () => this.rate(good));
      const icon = makeSvg("svg", { viewBox: "0 0 16 16", width: 15, height: 15, "aria-hidden": "true", class: good ? "" : "tsnb-down" });
      icon.append(makeSvg("path", { d: THUMB }));
      button.append(icon);
      return button;
    });
    const step = (by) => () => view.line.ask("choose", { column, answer: this.answer.v + by });
    this.back = quietButton("‹", "the answer before", step(-1));
    this.count = make("span", "tsnb-where");
    this.on = quietButton("›", "the next answer", step(1));
    this.again = quietButton("↻ Another", "draw another answer to this", () => view.line.ask("regenerate", { column }));
    this.copy = quietButton("Copy", "copy this answer", () => copyText(this.text, this.copy));
    this.figures = make("span", "tsnb-where tsnb-figures");
    this.tools.append(...this.thumbs, this.back, this.count, this.on, this.again, this.copy, this.figures);
    this.el.append(this.name, this.body, this.note, this.tools);
    this.body.addEventListener("mouseover", ({ target }) => target !== this.body && this.read(target));
    this.body.addEventListener("mouseleave", () => this.read(null));
    this.body.addEventListener("focus", () => this.read(this.body.firstChild));
    this.body.addEventListener("blur", () => this.read(null));
    this.body.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: "previousSibling", ArrowRight: "nextSibling" }[event.key];
      if (!by || this.mode !== "colour") return;
      event.preventDefault();
      this.read((this.at ?? this.body.firstChild)?.[by] ?? this.at);
    });
  }

  get text() {
    return (this.answer?.pieces ?? []).map(([text]) => text).join("");
  }

  rate(good) {
    const { answer, column, view } = this;
    view.line.ask("rate", { turn: this.number, column, answer: answer.v, good: answer.good === good ? null : good });
  }

  // Reads a token: its number is at the top of the conversation.
  read(token) {
    if (this.mode !== "colour" || token?.nodeType === 3) return;
    this.at?.classList.remove("tsnb-at");
    this.at = token;
    token?.classList.add("tsnb-at");
    fill(this.view.reading, token ? `“${token.textContent}” ${token.title}` : "");
  }

  update(number, answer, { last, going, wait, label }) {
    Object.assign(this, { number, answer });
    const over = Boolean(answer?.end);
    fill(this.name, plainText(label));
    this.name.hidden = !label;
    this.show(answer?.pieces ?? []);
    this.el.dataset.end = answer?.end ?? "";
    this.el.classList.toggle("tsnb-going", Boolean(answer) && !over);
    this.body.hidden = !this.text;
    const left = answer?.left ? `the first ${answer.left} turn${answer.left > 1 ? "s" : ""} no longer fitted: not read` : "";
    const empty = over && !this.text ? "(nothing was said: left out of what is read next)" : "";
    fill(this.note, plainText([answer?.why, empty, !over && wait ? `${wait} …` : "", left].filter(Boolean).join("\n")));
    this.note.classList.toggle("tsnb-bad-note", Boolean(answer?.why));
    this.tools.hidden = !over;
    if (!over) return;
    for (const [i, button] of this.thumbs.entries()) {
      button.setAttribute("aria-pressed", String(answer.good === !i));
      button.hidden = !this.text || Boolean(answer.why);
    }
    for (const part of [this.back, this.count, this.on]) part.hidden = answer.of < 2;
    fill(this.count, `${answer.v + 1}/${answer.of}`);
    this.back.disabled = !last || going || !answer.v;
    this.on.disabled = !last || going || answer.v + 1 === answer.of;
    this.again.hidden = !last;
    this.again.disabled = going;
    this.copy.hidden = !this.text;
    const tokens = answer.pieces.reduce((sum, piece) => sum + piece.length - 1, 0);
    const figures = [`${tokens} token${tokens === 1 ? "" : "s"}`, ENDS[answer.end] ?? "", answer.ver ? `policy ${answer.ver}` : ""];
    fill(this.figures, figures.filter(Boolean).join(" · "));
  }

  // The text, which grows at its end; with colours, a span for each piece.
  show(pieces) {
    const mode = this.view.colours ? "colour" : "plain";
    const words = plainPieces(pieces.map(([text]) => text));
    const same = mode === this.mode && this.words.length <= words.length && this.words.every((word, i) => word === words[i]);
    if (!same) {
      this.body.replaceChildren();
      this.words = [];
      this.at = null;
    }
    const fresh = words.slice(this.words.length);
    if (mode === "plain") {
      if (fresh.length) this.body.append(fresh.join(""));
      this.body.normalize();
    } else {
      for (const [i, word] of fresh.entries()) {
        const { level, words: told } = likely(pieces[this.words.length + i].slice(1));
        const span = make("span", `tsnb-p${level}`, word.replaceAll("\n", "↵\n"));
        span.title = told;
        this.body.append(span);
      }
    }
    this.words = words;
    if (mode === this.mode) return;
    this.mode = mode;
    for (const [name, value] of [["tabindex", "0"], ["role", "group"], ["aria-label", "answer: arrow keys read its tokens"]]) {
      if (mode === "colour") this.body.setAttribute(name, value);
      else this.body.removeAttribute(name);
    }
  }
}

// What the user said, to be said otherwise; under it the answers.
class TurnView {
  constructor(view, number) {
    Object.assign(this, { view, number, key: "" });
    this.el = make("div", "tsnb-turn");
    this.said = make("div", "tsnb-mine");
    this.words = make("div", "tsnb-words");
    this.words.dir = "auto";
    this.edit = quietButton("Edit", "say something else here, and go on from there", () => this.open());
    this.said.append(this.words, this.edit);
    this.answers = make("div", "tsnb-columns");
    this.el.append(this.said, this.answers);
    this.parts = [];
  }

  open() {
    const { line } = this.view;
    const area = makeField("textarea");
    area.value = line.turns.get(this.number)?.said ?? "";
    area.setAttribute("aria-label", "what you say instead");
    const close = () => {
      form.remove();
      this.said.hidden = false;
    };
    const send = () => area.value && line.ask("edit", { turn: this.number, text: area.value }, (why) => why || close());
    const form = make("div", "tsnb-mine tsnb-editing");
    form.append(area, makeButton("Send", send), makeButton("Cancel", close));
    onEnter(area, send, close);
    this.said.hidden = true;
    this.said.after(form);
    area.focus();
  }

  update(turn, context) {
    fill(this.words, plainText(turn.said));
    this.edit.disabled = context.going;
    while (this.parts.length < context.names.length) {
      this.parts.push(new AnswerView(this.view, this.parts.length));
      this.answers.append(this.parts.at(-1).el);
    }
    for (const [i, part] of this.parts.entries()) {
      part.update(this.number, turn.answers[i], { ...context, wait: context.last ? context.waits[i] : "", label: context.names.length > 1 ? context.names[i] : "" });
    }
  }
}

function onEnter(area, send, leave) {
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
    if (event.key !== "Enter" || event.isComposing) return;
    event.preventDefault();
    event.stopPropagation();
    if (!event.shiftKey) return send();
    area.setRangeText("\n", area.selectionStart, area.selectionEnd, "end"); // by hand: JupyterLab lets none through
    area.dispatchEvent(new Event("input"));
  });
}

class ChatView {
  constructor(line, model, el) {
    Object.assign(this, { line, model, colours: false, views: new Map(), spoken: null, saved: line.rows });
    this.build();
    el.append(this.root);
    this.update = () => this.refresh();
    line.listeners.add(this.update);
    this.timer = setInterval(this.update, 1000);
    this.place = new Place(this.root, el);
    this.refresh();
  }

  build() {
    this.root = make("section", "tsnb-panel tsnb-chat");
    this.root.dataset.lmSuppressShortcuts = "true";
    this.root.setAttribute("aria-label", this.model.get("title"));
    watchWidth(this.root, 640);
    const head = make("div", "tsnb-head");
    this.title = make("span", "tsnb-facts");
    const toggle = (text, title, action) => makeButton(text, () => {
      action();
      this.refresh(true);
    }, title);
    this.colour = toggle("Log-probabilities", "shade each token by how likely the model found it", () => (this.colours = !this.colours));
    this.gear = toggle("Settings", "system prompt, temperature, length", () => (this.form.hidden = !this.form.hidden));
    const copy = makeButton("Copy all", () => copyText(this.transcript, copy), "the conversation as text");
    this.clear = makeSure("Clear", "Begin anew?", () => this.line.ask("clear", {}));
    const buttons = make("span", "tsnb-buttons");
    buttons.append(this.colour, this.gear, copy, this.clear);
    head.append(this.title, buttons);
    this.form = this.settings();
    this.note = new Note(this.line);
    this.about = make("div", "tsnb-columns tsnb-abouts");
    this.legend = make("div", "tsnb-likely");
    this.legend.append(make("span", "", "probability of each token:"));
    for (const [i, [, words]] of LIKELY.entries()) this.legend.append(make("span", `tsnb-p${i}`, words));
    this.reading = make("span", "tsnb-reading", "");
    this.reading.setAttribute("aria-live", "polite");
    this.legend.append(this.reading);
    this.log = make("div", "tsnb-log");
    this.log.tabIndex = 0;
    this.log.setAttribute("role", "region");
    this.log.setAttribute("aria-label", "conversation");
    this.more = makeButton("Show earlier turns", () => this.line.ask("earlier", {}));
    this.empty = make("p", "tsnb-where tsnb-hello");
    this.log.append(this.more, this.empty);
    const write = make("div", "tsnb-write");
    this.area = makeField("textarea", { rows: 1, placeholder: "Enter sends, Shift+Enter begins a new line" });
    this.area.setAttribute("aria-label", "what you say");
    this.area.addEventListener("input", () => this.grow());
    onEnter(this.area, () => this.say(), () => this.line.status.going && this.line.ask("stop", {}));
    this.send = makeButton("Send", () => this.say());
    this.send.classList.add("tsnb-main");
    this.stop = makeButton("Stop", () => this.line.ask("stop", {}), "what was said stays (Escape)");
    this.stop.dataset.do = "stop";
    write.append(this.area, this.send, this.stop);
    const foot = make("div", "tsnb-foot");
    this.pairs = make("span", "tsnb-subject");
    this.save = makeButton("Save rows", () => this.line.ask("rows", {}), "the pairs as JSON lines; in Python: chat.rows");
    this.fresh = make("span", "tsnb-fresh");
    this.voice = make("span", "tsnb-voice");
    this.voice.setAttribute("aria-live", "polite");
    foot.append(this.pairs, this.save, this.fresh, this.voice);
    this.root.append(head, this.form, this.note.el, this.about, this.legend, this.log, write, foot);
  }

  settings() {
    const form = make("div", "tsnb-settings");
    form.hidden = true;
    this.fields = {};
    const field = (name, text, input, help) => {
      const label = make("label", "", text);
      input.title = help;
      input.addEventListener("change", () => this.set(name, input.value));
      label.append(input);
      form.append(label);
      this.fields[name] = input;
    };
    field("system", "System prompt", makeField("textarea", { rows: 2 }), "before the conversation, from the next message on");
    for (const [name, text, attributes, help] of SETS) field(name, text, makeField("input", { type: "number", ...attributes }), help);
    return form;
  }

  set(name, value) {
    const given = name === "system" ? value : value === "" ? (name === "seed" ? null : this.line.settings[name]) : Number(value);
    this.line.ask("set", { [name]: given }, (why) => why && this.refill());
  }

  refill() {
    for (const [name, input] of Object.entries(this.fields)) {
      if (input !== document.activeElement) input.value = this.line.settings[name] ?? "";
    }
    this.filled = this.line.settings;
  }

  say() {
    const text = this.area.value;
    if (!text || this.line.status.going || this.line.cut) return;
    this.area.value = "";
    this.grow();
    this.follow = true;
    this.line.ask("say", { text }, (why) => {
      if (!why || this.area.value) return;
      this.area.value = text; // it was refused: nothing is lost
      this.grow();
    });
  }

  grow() {
    this.area.rows = Math.min(8, this.area.value.split("\n").length);
  }

  get names() {
    return (this.line.status.columns ?? []).map(({ name }) => name);
  }

  get transcript() {
    const lines = [];
    for (const [, turn] of this.ordered) {
      lines.push(`user: ${turn.said}`);
      for (const [i, answer] of turn.answers.entries()) if (answer) lines.push(`${this.names[i]}: ${answer.pieces.map(([text]) => text).join("")}`);
    }
    return lines.join("\n\n");
  }

  get ordered() {
    return [...this.line.turns].sort(([one], [other]) => one - other);
  }

  refresh(again = false) {
    const { line, log } = this;
    const { status } = line;
    const going = Boolean(status.going);
    const dead = line.cut || Boolean(status.gone);
    Object.assign(this.root.dataset, { going, turns: line.turns.size, acked: line.acked, pairs: status.pairs ?? 0, doubt: line.cut ? "NO KERNEL" : "" });
    fill(this.title, plainText(this.model.get("title")));
    this.colour.setAttribute("aria-pressed", String(this.colours));
    this.gear.setAttribute("aria-expanded", String(!this.form.hidden));
    this.legend.hidden = !this.colours;
    if (this.filled !== line.settings) this.refill();
    const troubles = (status.columns ?? []).map(({ trouble }) => trouble).filter(Boolean);
    this.note.update([status.gone, ...troubles].filter(Boolean).join("\n"), status.hint);
    this.showColumns(status.columns ?? []);
    const near = this.follow || log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    this.showTurns(going, again);
    if (near) log.scrollTop = log.scrollHeight;
    this.follow = false;
    this.send.hidden = going;
    this.stop.hidden = !going;
    this.send.disabled = this.area.disabled = dead;
    this.clear.disabled = dead || !line.turns.size;
    this.showPairs(status);
    fill(this.fresh, line.cut ? LAST_WORD : line.answered || line.tries < 2 ? "" : asking(line, line.now()));
    this.speak(going);
    if (line.rows && line.rows !== this.saved) this.download((this.saved = line.rows));
  }

  showColumns(columns) {
    this.root.style.setProperty("--tsnb-columns", columns.length || 1);
    const key = JSON.stringify(columns);
    if (key === this.columnsKey) return;
    this.columnsKey = key;
    this.about.replaceChildren(...columns.map(({ name, about, remarks }) => {
      const head = make("div");
      if (columns.length > 1) head.append(make("b", "", plainText(name)));
      head.append(make("span", "tsnb-where", plainText([about, ...remarks].join(" · "))));
      return head;
    }));
    const plain = columns.some(({ remarks }) => remarks.length && remarks[0].startsWith("no chat"));
    fill(this.empty, plain ? "Write the beginning of a text: the model continues it." : "Say something to begin.");
  }

  showTurns(going, again) {
    const { line } = this;
    const turns = this.ordered;
    const names = this.names;
    const last = turns.at(-1)?.[0];
    this.more.hidden = !line.first;
    this.empty.hidden = turns.length > 0;
    for (const [number, view] of this.views) {
      if (line.turns.has(number) && view.turn === line.turns.get(number)) continue;
      view.el.remove();
      this.views.delete(number);
    }
    let before = this.empty;
    for (const [number, turn] of turns) {
      let view = this.views.get(number);
      if (!view) {
        view = Object.assign(new TurnView(this, number), { turn });
        this.views.set(number, view);
        before.after(view.el);
      }
      before = view.el;
      const key = JSON.stringify([turn.seen, number === last, going, names, number === last && line.status.waits]);
      if (key === view.key && !again) continue;
      view.key = key;
      view.update(turn, { last: number === last, going, names, waits: line.status.waits ?? [] });
    }
  }

  showPairs({ pairs = 0, unpaired = 0 }) {
    const counted = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
    const words = [pairs ? `${counted(pairs, "preference pair")}: chat.rows` : "", unpaired ? `${counted(unpaired, "thumb")} without a counterpart` : ""];
    fill(this.pairs, words.filter(Boolean).join(" · ") || "a thumb up and a thumb down for the same message are a pair");
    this.save.hidden = !pairs;
  }

  // Says, once an answer is over, what was said.
  speak(going) {
    if (this.spoken && !going) {
      const turn = this.ordered.at(-1)?.[1];
      fill(this.voice, plainText((turn?.answers ?? []).map((answer, i) => `${this.names[i]}: ${answer.pieces.map(([text]) => text).join("")}`).join(". ")));
    }
    this.spoken = going;
  }

  download({ name, lines }) {
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([lines], { type: "application/jsonl" }));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  }

  destroy() {
    clearInterval(this.timer);
    this.line.listeners.delete(this.update);
    this.place.destroy();
  }
}

export default () => {
  let line;
  return {
    initialize({ model }) {
      line = tie(model, new ChatLine((content) => model.send(content)));
    },
    render({ model, el }) {
      const view = new ChatView(line, model, el);
      return () => view.destroy();
    },
  };
};
export { ChatLine, ChatView, likely };
