// The rollouts of a step, prompt by prompt, their tokens shaded by what they were taught, conversations turn by turn; and
// what the policy answers to the same held-out prompts at two steps.
import { settle } from "./wire.js";
import { fill, make, makeButton, makeSelect, numberText, plainPieces, plainText, signed, watchWidth } from "./page.js";

const ORDERS = { sampled: null, reward: (r) => r.reward ?? -Infinity, advantage: (r) => r.adv ?? -Infinity, length: (r) => r.n };
const POLICY = "assistant";
const KEEPS = {
  all: () => true, "with signal": (g) => g.signal, "without signal": (g) => !g.signal, "reward errors": (g) => g.r.some((r) => r.error),
};

// The groups that a filter and a search keep, those with signal first, their rollouts in order.
function arranged(groups, order, keep, search) {
  const of = ORDERS[order];
  const wanted = search.toLowerCase();
  const has = (text) => text.toLowerCase().includes(wanted);
  return groups.filter((g) => KEEPS[keep](g) && (!wanted || has(g.prompt) || g.r.some((r) => has(r.text))))
    .sort((one, other) => Number(Boolean(other.signal)) - Number(Boolean(one.signal)))
    .map((g) => ({ ...g, r: of ? [...g.r].sort((one, other) => of(other) - of(one)) : g.r }));
}

// The prompts that were answered at both of two steps, in one order: [group before, group after].
function paired(before, after, search = "") {
  const there = new Map(before.map((group) => [group.id, group]));
  const wanted = search.toLowerCase();
  return after.filter(({ id, prompt }) => there.has(id) && prompt.toLowerCase().includes(wanted)).map((group) => [there.get(group.id), group]);
}

// Which two of the steps at which held-out prompts were answered are compared: the first, and that of a chosen step.
function pairOf(steps, chosen = Infinity) {
  const reached = steps.filter((step) => step <= chosen);
  const after = reached.length > 1 ? reached.at(-1) : steps[1];
  return [steps[0], after];
}

// A number without needless zeros.
function briefly(value) {
  return value != null && Number.isFinite(value) && Math.abs(value) < 1e4 ? String(+value.toPrecision(3)) : numberText(value, 3);
}

// The tokens of an answer, or of all turns of the policy in a conversation.
function tokensOf(rollout) {
  return rollout.tok ?? (rollout.turns ?? []).flatMap(({ tok }) => tok ?? []);
}

function counted(n, what) {
  return `${n} ${what}${n === 1 ? "" : "s"}`;
}

class Samples {
  constructor(store, model) {
    Object.assign(this, { store, model, order: "sampled", keep: "all", search: "", beside: false, asked: null, pair: null });
    this.el = make("div", "tsnb-samples");
    watchWidth(this.el, 640);
    this.head = make("div", "tsnb-tools");
    this.lists = make("div", "tsnb-lists");
    this.lists.setAttribute("role", "group");
    this.lists.setAttribute("aria-label", "answers: arrow keys go from answer to answer and from token to token");
    this.token = make("div", "tsnb-token");
    this.token.setAttribute("aria-live", "polite");
    this.title = make("b", "tsnb-title");
    this.title.tabIndex = -1;
    this.count = make("span", "tsnb-where");
    const redo = () => {
      this.key = null;
      this.update();
    };
    const search = make("input");
    search.type = "search";
    search.placeholder = "search";
    search.setAttribute("aria-label", "search in prompts and answers");
    search.addEventListener("input", () => {
      this.search = search.value;
      redo();
    });
    this.follow = makeButton("Newest", () => settle(model, "selected_step", null), "follow the newest step again");
    this.compare = makeButton("Compare", () => {
      this.beside = !this.beside;
      this.pair = null;
      redo();
    }, "the answers to the held-out prompts, at two steps");
    const pick = (label, options, name) => makeSelect(label, options.map((o) => [o, `${label} ${o}`]), this[name], (value) => {
      this[name] = value;
      redo();
    });
    this.sorts = [pick("as", Object.keys(ORDERS), "order"), pick("show", Object.keys(KEEPS), "keep")];
    this.picks = [0, 1].map((i) => makeSelect(i ? "compared with step" : "step", [], "", (value) => {
      this.pair[i] = Number(value);
      redo();
    }));
    this.head.append(this.title, this.count, ...this.picks, ...this.sorts, search, this.compare, this.follow);
    this.el.append(this.head, this.lists, this.token);
    this.lists.addEventListener("keydown", (event) => this.steer(event));
    this.el.addEventListener("keydown", (event) => event.key === "Escape" && this.onLeave?.());
  }

  get step() {
    return this.model.get("selected_step") ?? this.store.newest;
  }

  // Whether there is, or was, something to show: a run without rewards has no samples.
  get known() {
    return this.store.newest !== undefined;
  }

  update() {
    const { store, step } = this;
    if (step === undefined) {
      fill(this.title, "samples: they come with the first step");
      return;
    }
    const held = store.held;
    const chosen = this.model.get("selected_step");
    this.compare.hidden = held.length < 2;
    this.beside &&= held.length > 1;
    if (!this.beside) this.ask(step);
    else {
      if (!this.pair || this.paired !== chosen) this.pair = pairOf(held, chosen ?? Infinity);
      this.paired = chosen;
      for (const at of this.pair) this.ask(at, true);
    }
    const shown = this.beside ? this.pair.map((at) => store.heldOut.get(at)) : [store.rollouts.get(step)];
    const key = JSON.stringify([this.beside, this.beside ? [this.pair, held] : step, shown.map(Boolean)]);
    if (key === this.key || (chosen === null && this.key && this.lists.contains(document.activeElement))) return;
    this.key = key;
    this.follow.hidden = chosen === null || this.beside; // whoever compares has chosen both steps
    this.compare.setAttribute("aria-pressed", String(this.beside));
    for (const sort of this.sorts) sort.hidden = this.beside;
    this.showPicks(held);
    fill(this.title, this.beside ? "held-out prompts" : `samples of step ${step}`);
    this.el.dataset.step = shown.every(Boolean) ? step : "";
    fill(this.token, "");
    this.count.setAttribute("aria-live", chosen === null ? "off" : "polite"); // who follows is not told of every step
    this.lists.replaceChildren(...(this.beside ? this.comparison(...shown) : this.list(shown[0])));
    for (const [i, answer] of this.answers.entries()) answer.tabIndex = i ? -1 : 0;
  }

  get answers() {
    return [...this.lists.querySelectorAll(".tsnb-answer")];
  }

  showPicks(held) {
    for (const [i, pick] of this.picks.entries()) {
      pick.hidden = !this.beside;
      if (!this.beside) continue;
      pick.replaceChildren(...held.map((at) => {
        const option = make("option", "", `${i ? "with" : "step"} ${at}`);
        option.value = at;
        return option;
      }));
      pick.value = this.pair[i];
    }
  }

  // After a click on a point: what was chosen is scrolled to, in focus, and said.
  reveal() {
    if (this.el.hidden) return;
    this.update();
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.el.scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
    this.title.focus({ preventScroll: true });
  }

  ask(step, held = false) {
    const name = `${step} ${held}`;
    if (step < 1 && !held) return;
    if ((held ? this.store.heldOut : this.store.rollouts).has(step) || this.asked === name) return;
    this.asked = name;
    this.store.show(step, held);
  }

  list(found) {
    if (!found?.groups) {
      fill(this.count, "");
      return [make("p", "tsnb-where", found?.why ?? "asking the kernel …")];
    }
    const { groups } = found;
    const signal = groups.filter((group) => group.signal).length;
    const versions = new Set(groups.flatMap((group) => group.r.map((rollout) => rollout.policy)));
    this.version = versions.size === 1 ? [...versions][0] : undefined;
    const shaded = groups.some(({ r }) => r.some(({ turns }) => turns)) ? " · shaded: said by the environment, not trained" : "";
    const thrown = found.thrown_away ? `, ${found.thrown_away} thrown away without` : "";
    fill(this.count, `${groups.length + (found.left_out || 0)} prompts, ${signal} with signal${thrown}${this.version === undefined ? "" : `, policy ${this.version}`}${shaded}`);
    const kept = arranged(groups, this.order, this.keep, this.search);
    const cards = kept.map((group) => this.group(group));
    if (!kept.length) cards.push(make("p", "tsnb-where", "nothing here is as asked for"));
    if (found.left_out) cards.push(make("p", "tsnb-where", `${found.left_out} further prompts: rlvr.TrajectoryBatch.load() reads them all`));
    return cards;
  }

  // The same held-out prompts at two steps, side by side.
  comparison(before, after) {
    const missing = [before, after].find((found) => !found?.groups);
    fill(this.count, "");
    if (missing || !before || !after) return [make("p", "tsnb-where", missing?.why ?? "asking the kernel …")];
    const pairs = paired(before.groups, after.groups, this.search);
    const better = pairs.filter(([one, other]) => other.mean > one.mean).length;
    const worse = pairs.filter(([one, other]) => other.mean < one.mean).length;
    fill(this.count, `${pairs.length} prompts: ${better} better, ${worse} worse`);
    return pairs.length ? pairs.map((pair) => this.versus(pair)) : [make("p", "tsnb-where", "no prompt was answered at both steps")];
  }

  versus(pair) {
    const card = make("div", "tsnb-card");
    const change = pair[1].mean - pair[0].mean;
    const reward = `reward ${briefly(pair[0].mean)} → ${briefly(pair[1].mean)}${change ? ` (${signed(change)})` : ""}`;
    const columns = make("div", "tsnb-versus");
    for (const [i, group] of pair.entries()) {
      const column = make("div");
      column.append(make("span", "tsnb-where", `step ${this.pair[i]}`), ...group.r.map((rollout) => this.rollout(rollout, 1, group)));
      columns.append(column);
    }
    card.append(this.prompt(pair[1], reward), columns);
    return card;
  }

  prompt({ prompt }, words) {
    const head = make("div", "tsnb-prompt");
    const text = make("q", "", plainText(prompt));
    text.dir = "auto";
    head.append(text, make("span", "tsnb-where", words));
    return head;
  }

  group(group) {
    const card = make("div", "tsnb-card");
    const spread = group.signal ? `spread ${briefly(group.std)}` : "no signal: nothing to prefer";
    const most = Math.max(...group.r.flatMap((r) => [r.adv, ...tokensOf(r).map(([, a]) => a)]).map((a) => Math.abs(a ?? 0)), 1e-9);
    const rate = group.rate == null ? "" : `, lately ${Math.round(100 * group.rate)} % right`;
    const before = group.answered ? `, asked ${counted(group.answered, "time")} before${rate}` : "";
    card.append(this.prompt(group, `reward ${briefly(group.mean)}, ${spread}${before}`), ...group.r.map((rollout) => this.rollout(rollout, most, group)));
    return card;
  }

  // An answer and its figures; what says nothing is left out: an advantage that nobody computed, the same reason twice.
  rollout(rollout, most, group) {
    const line = make("div", "tsnb-rollout");
    const parts = Object.entries(rollout.parts ?? {}).map(([name, value]) => `${name} ${briefly(value)}`);
    const version = rollout.policy === this.version || this.beside ? "" : `policy ${rollout.policy ?? "?"}`;
    const spoken = rollout.turns?.filter(({ who }) => who === POLICY).length;
    const details = [rollout.greedy ? "greedy" : "", ...parts, rollout.end, version, spoken ? counted(spoken, "turn") : "", counted(rollout.n, "token")];
    line.append(rollout.turns ? this.talk(rollout, most) : this.answer(rollout, most));
    if (!this.beside) {
      const advantage = make("b", "tsnb-number", rollout.adv == null ? "" : `A ${signed(rollout.adv)}`);
      advantage.dataset.term = "A";
      line.append(advantage);
    }
    line.append(make("span", "tsnb-number", rollout.error ? "" : `reward ${briefly(rollout.reward)}`), make("span", "tsnb-where tsnb-details", plainText(details.filter(Boolean).join(" · "))));
    if (rollout.error) line.append(make("div", "tsnb-bad-note tsnb-wide", plainText(`reward failed: ${rollout.error}`)));
    else if (rollout.why && group.signal) {
      const why = make("details", "tsnb-wide");
      why.append(make("summary", "", "why zero?"), make("span", "", plainText(rollout.why)));
      line.append(why);
    }
    return line;
  }

  // A conversation. What the environment said is shaded: the policy read it, and nothing is learnt of it.
  talk(rollout, most) {
    const talk = make("ol", "tsnb-talk");
    let number = 0;
    for (const turn of rollout.turns) {
      const item = make("li");
      if (turn.who === POLICY) {
        number += 1;
        item.append(this.answer({ ...rollout, tok: turn.tok, text: turn.text }, most, `turn ${number}`));
        for (const [call, fine] of turn.calls ?? []) item.append(make("span", fine ? "tsnb-call" : "tsnb-call tsnb-failed", plainText(`${fine ? "called" : "failed"} ${call}`)));
        if (turn.reward != null) item.append(make("b", "tsnb-number", `reward ${signed(turn.reward)}`));
      } else {
        const told = make("span", "tsnb-told", plainText(turn.text).replaceAll("\n", "↵\n"));
        told.dir = "auto";
        told.title = `not trained: ${turn.n ? counted(turn.n, "token") : "told with what stands above"}`;
        item.append(make("span", "tsnb-where", plainText(turn.name ? `${turn.who} ${turn.name}` : turn.who)), told);
      }
      talk.append(item);
    }
    return talk;
  }

  // Blue underlined: more of this; orange dotted: less.
  answer(rollout, most, what = "answer") {
    const text = make("span", "tsnb-answer");
    text.dir = "auto";
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", rollout.adv == null ? `${what}, reward ${briefly(rollout.reward)}` : `${what}, advantage ${signed(rollout.adv)}`);
    const pieces = rollout.tok ?? (rollout.text ? [[rollout.text, null]] : []);
    for (const [i, word] of plainPieces(pieces.map(([word]) => word)).entries()) {
      const own = pieces[i][1];
      const advantage = own ?? rollout.adv ?? 0;
      const span = make("span", advantage > 0 ? "tsnb-more" : advantage < 0 ? "tsnb-less" : "", word.replaceAll("\n", "↵\n"));
      span.style.setProperty("--tsnb-share", `${Math.round((60 * Math.abs(advantage)) / most)}%`);
      if (rollout.adv != null || own != null) span.title = signed(advantage);
      text.append(span);
    }
    if (!pieces.length) text.append(make("span", "tsnb-where", "(empty)"));
    text.addEventListener("focus", () => this.read(text, 0));
    text.addEventListener("blur", () => text.querySelector(".tsnb-at")?.classList.remove("tsnb-at"));
    return text;
  }

  // Left and right read the tokens of the answer in focus, up and down go to another answer.
  steer(event) {
    const answer = event.target.closest(".tsnb-answer");
    const along = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const across = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!answer || !(along || across)) return;
    event.preventDefault();
    if (along) return this.read(answer, [...answer.children].indexOf(answer.querySelector(".tsnb-at")) + along);
    const { answers } = this;
    const next = answers[answers.indexOf(answer) + across];
    if (!next) return;
    answer.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }

  read(answer, i) {
    const tokens = [...answer.children];
    const at = Math.max(0, Math.min(tokens.length - 1, i));
    for (const [k, token] of tokens.entries()) token.classList.toggle("tsnb-at", k === at);
    const { title, textContent } = tokens[at];
    this.token.textContent = `token ${at + 1} of ${tokens.length} “${textContent}”${title ? ` advantage ${title}` : ""}`;
  }
}

export { Samples, arranged, pairOf, paired, tokensOf };
