// The privacy account: what was spent of what, or that there is none.
import { fill, make } from "./page.js";

function small(value) {
  return value === "∞" ? value : value >= 1e-3 ? value.toFixed(2) : value.toExponential(1).replace(".0e", "e");
}

// The account in words: the sentence, what it will come to, and the share of the budget for a bar (null: no bar).
function account(spent, dp) {
  if (spent?.void || spent?.spent === "∞") return { text: `ε ∞: no guarantee. ${spent.void ?? ""}`.trim(), share: null, bad: true };
  if (!spent?.accountant) return { text: dp ? "ε —: no step taken yet" : "DP off: this training is not differentially private", share: null };
  const of = spent.target == null ? "" : ` of ${small(spent.target)}`;
  const text = `ε ${small(spent.spent)}${of} at δ = ${small(spent.delta)} (${spent.accountant}, ${spent.adjacency})`;
  const share = spent.target == null ? null : Math.min(1, spent.spent / spent.target);
  if (spent.refused != null) return { text, share, bad: true, end: `step ${spent.refused + 1} was refused: it would cost more than the budget` };
  return { text, share, end: spent.projected == null ? "" : `reaches ${small(spent.target)} at step ${spent.projected.toLocaleString("en")}` };
}

const SLIDERS = [
  ["sigma", "noise σ", 0.3, 4, 0.05],
  ["batch", "units per step", 1, 0, 1],
  ["epochs", "epochs", 1, 50, 1],
  ["epsilon", "ε", 0.1, 20, 0.1],
];

// What if: sliders that ask the kernel, which answers without spending anything. Moving ε asks for σ, the others for ε.
class Plan {
  constructor(store) {
    this.store = store;
    this.asked = 0;
    this.inputs = {};
    this.el = make("details", "tsnb-plan");
    this.el.append(make("summary", "", "what if"));
    for (const [name, text, min, max, step] of SLIDERS) this.el.append(this.slider(name, text, { min, max, step }));
    this.says = make("output", "tsnb-says");
    this.el.append(this.says);
    this.el.addEventListener("toggle", () => this.el.open && !this.asked && this.ask("sigma"));
  }

  slider(name, text, range) {
    const label = make("label", "", `${text} `);
    const input = make("input");
    Object.assign(input, { type: "range", ...range });
    const value = make("output");
    input.addEventListener("input", () => {
      value.textContent = input.value;
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.ask(name), 150);
    });
    label.append(input, value);
    this.inputs[name] = { input, value };
    return label;
  }

  set(name, number) {
    const { input, value } = this.inputs[name];
    input.value = number;
    value.textContent = typeof number === "number" ? String(Number(number.toPrecision(3))) : number;
  }

  begin({ sigma, batch, size }) {
    this.begun = true;
    this.inputs.batch.input.max = size;
    for (const [name, number] of [["sigma", sigma], ["batch", batch], ["epochs", 3]]) this.set(name, number);
  }

  ask(moved) {
    const { sigma, batch, epochs, epsilon } = Object.fromEntries(SLIDERS.map(([name]) => [name, Number(this.inputs[name].input.value)]));
    const wanted = moved === "epsilon" ? { epsilon } : { sigma };
    this.store.send({ t: "plan", n: ++this.asked, batch, epochs, ...wanted });
  }

  update(first, answer) {
    this.el.hidden = !first;
    if (first && !this.begun) this.begin(first);
    if (!answer || answer.n !== this.asked || answer === this.answered) return;
    this.answered = answer;
    this.el.dataset.answered = answer.n;
    if (answer.why) this.says.textContent = answer.why;
    else {
      this.set("sigma", answer.sigma);
      this.set("epsilon", answer.epsilon);
      const ratio = answer.ratio == null ? "" : `, noise ${answer.ratio.toPrecision(2)} × the largest signal`;
      this.says.textContent = `${answer.steps.toLocaleString("en")} steps from the start${ratio}`;
    }
  }
}

class Meter {
  constructor(store) {
    this.store = store;
    this.el = make("div", "tsnb-meter");
    this.text = make("span");
    this.text.dataset.term = "ε";
    this.bar = make("div", "tsnb-gauge");
    this.bar.setAttribute("role", "meter");
    this.bar.setAttribute("aria-label", "share of the privacy budget that is spent");
    this.bar.setAttribute("aria-valuemin", 0);
    this.bar.setAttribute("aria-valuemax", 1);
    this.bar.append(make("div"));
    this.end = make("span", "tsnb-where");
    this.plan = new Plan(store);
    this.el.append(this.text, this.bar, this.end, this.plan.el);
  }

  update() {
    this.el.hidden = this.store.status.dp === undefined; // not told yet
    const { text, share, bad = false, end = "" } = account(this.store.parts.privacy, this.store.status.dp);
    this.plan.update(this.store.parts.privacy?.plan, this.store.parts.plan);
    fill(this.text, text);
    fill(this.end, end);
    this.bar.hidden = share === null;
    this.bar.setAttribute("aria-valuenow", share ?? 0);
    this.bar.firstChild.style.width = `${100 * (share ?? 0)}%`;
    this.el.classList.toggle("tsnb-spent", bad);
    this.el.dataset.epsilon = this.store.parts.privacy?.spent ?? "";
  }
}

export { Meter, Plan, account };
