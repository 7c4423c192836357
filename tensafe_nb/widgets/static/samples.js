// The rollouts of a step, prompt by prompt, their tokens shaded by what they were taught.
import { settle } from "./wire.js";
import { make, makeButton, makeSelect, numberText, plainText, signed } from "./page.js";

const ORDERS = { sampled: null, reward: (r) => r.reward ?? -Infinity, advantage: (r) => r.adv ?? -Infinity, length: (r) => r.n };
const KEEPS = {
  all: () => true, "with signal": (g) => g.signal, "without signal": (g) => !g.signal, "reward errors": (g) => g.r.some((r) => r.error),
};

// The groups that a filter and a search keep, their rollouts in order.
function arranged(groups, order, keep, search) {
  const of = ORDERS[order];
  const wanted = search.toLowerCase();
  const has = (text) => text.toLowerCase().includes(wanted);
  return groups.filter((g) => KEEPS[keep](g) && (!wanted || has(g.prompt) || g.r.some((r) => has(r.text))))
    .map((g) => ({ ...g, r: of ? [...g.r].sort((one, other) => of(other) - of(one)) : g.r }));
}

class Samples {
  constructor(store, model) {
    Object.assign(this, { store, model, order: "sampled", keep: "all", search: "", beside: false, asked: null });
    this.el = make("div", "tsnb-samples");
    this.head = make("div", "tsnb-tools");
    this.lists = make("div", "tsnb-lists");
    this.token = make("div", "tsnb-token");
    this.token.setAttribute("aria-live", "polite");
    this.title = make("b", "tsnb-title");
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
      redo();
    }, "beside those of the step before");
    const pick = (label, options, name) => makeSelect(label, options.map((o) => [o, `${label} ${o}`]), this[name], (value) => {
      this[name] = value;
      redo();
    });
    this.head.append(this.title, pick("as", Object.keys(ORDERS), "order"), pick("show", Object.keys(KEEPS), "keep"), search, this.compare, this.follow);
    this.el.append(this.head, this.lists, this.token);
  }

  get step() {
    return this.model.get("selected_step") ?? this.store.newest;
  }

  get known() {
    return this.store.newest !== undefined || this.model.get("selected_step") !== null;
  }

  update() {
    const { store, step } = this;
    if (step === undefined) {
      this.title.textContent = "samples: they come with the first step";
      return;
    }
    const steps = this.beside ? [step, step - 1] : [step];
    for (const wanted of steps) this.ask(wanted);
    const following = this.model.get("selected_step") === null;
    const key = JSON.stringify([steps, steps.map((s) => store.rollouts.has(s))]);
    if (key === this.key || (following && this.key && this.lists.contains(document.activeElement))) return;
    this.key = key;
    this.follow.hidden = following;
    this.compare.setAttribute("aria-pressed", String(this.beside));
    this.title.textContent = `samples of step ${step}`;
    this.el.dataset.step = store.rollouts.has(step) ? step : "";
    this.token.textContent = "";
    this.lists.replaceChildren(...steps.map((s) => this.list(s)));
  }

  ask(step) {
    if (step < 1 || this.store.rollouts.has(step) || this.asked === step) return;
    this.asked = step;
    this.store.show(step);
  }

  list(step) {
    const column = make("div");
    const found = this.store.rollouts.get(step);
    if (this.beside) column.append(make("b", "", `step ${step}`));
    if (!found?.groups) {
      column.append(make("p", "tsnb-where", found?.why ?? (step < 1 ? "There is no step before." : "asking the kernel …")));
      return column;
    }
    column.append(...arranged(found.groups, this.order, this.keep, this.search).map((group) => this.group(group)));
    if (found.left_out) column.append(make("p", "tsnb-where", `${found.left_out} further prompts: rlvr.TrajectoryBatch.load() reads them all`));
    return column;
  }

  group(group) {
    const card = make("div", "tsnb-card");
    const head = make("div", "tsnb-prompt");
    const spread = group.signal ? `spread ${numberText(group.std)}` : "no signal: nothing to prefer";
    head.append(make("q", "", plainText(group.prompt)), make("span", "tsnb-where", `reward ${numberText(group.mean)}, ${spread}`));
    const most = Math.max(...group.r.flatMap((r) => [r.adv, ...(r.tok ?? []).map(([, a]) => a)]).map((a) => Math.abs(a ?? 0)), 1e-9);
    card.append(head, ...group.r.map((rollout) => this.rollout(rollout, most)));
    return card;
  }

  rollout(rollout, most) {
    const line = make("div", "tsnb-rollout");
    const facts = make("span", "tsnb-facts-of-rollout");
    const parts = Object.entries(rollout.parts ?? {}).map(([name, value]) => `${name} ${numberText(value)}`);
    facts.append(make("b", "", `A ${signed(rollout.adv)}`), make("span", "", `reward ${numberText(rollout.reward)}`), make("span", "tsnb-where", plainText([...parts, rollout.end, `v${rollout.policy ?? "?"}`, `${rollout.n} tokens`].join(" · "))));
    line.append(this.answer(rollout, most), facts);
    if (rollout.error) line.append(make("div", "tsnb-bad-note", plainText(`reward failed: ${rollout.error}`)));
    if (rollout.why) {
      const why = make("details");
      why.append(make("summary", "", "why zero?"), make("span", "", plainText(rollout.why)));
      line.append(why);
    }
    return line;
  }

  // Blue underlined: more of this; orange dotted: less. Arrow keys read the tokens of an answer in focus.
  answer(rollout, most) {
    const text = make("span", "tsnb-answer");
    text.tabIndex = 0;
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", `answer, advantage ${signed(rollout.adv)}`);
    const tokens = (rollout.tok ?? [[rollout.text, null]]).map(([word, own]) => {
      const advantage = own ?? rollout.adv ?? 0;
      const span = make("span", advantage > 0 ? "tsnb-more" : advantage < 0 ? "tsnb-less" : "", plainText(word).replaceAll("\n", "↵\n"));
      span.style.setProperty("--tsnb-share", `${Math.round((60 * Math.abs(advantage)) / most)}%`);
      span.title = signed(advantage);
      return span;
    });
    text.append(...tokens);
    let at = -1;
    const read = (i) => {
      tokens[at]?.classList.remove("tsnb-at");
      at = Math.max(0, Math.min(tokens.length - 1, i));
      tokens[at].classList.add("tsnb-at");
      this.token.textContent = `token ${at + 1} of ${tokens.length} “${tokens[at].textContent}” advantage ${tokens[at].title}`;
    };
    text.addEventListener("focus", () => read(0));
    text.addEventListener("blur", () => tokens[at]?.classList.remove("tsnb-at"));
    text.addEventListener("keydown", (event) => {
      if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
      event.preventDefault();
      read(at + (event.key === "ArrowRight" ? 1 : -1));
    });
    return text;
  }
}

export { Samples, arranged };
