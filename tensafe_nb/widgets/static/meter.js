// The privacy account: what was spent of what, or that there is none.
import { make } from "./page.js";

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
  if (spent.refused != null) return { text, share, bad: true, end: `step ${spent.refused} was refused: it would cost more than the budget` };
  return { text, share, end: spent.projected == null ? "" : `reaches ${small(spent.target)} at step ${spent.projected.toLocaleString("en")}` };
}

class Meter {
  constructor(store) {
    this.store = store;
    this.el = make("div", "tsnb-meter");
    this.text = make("span");
    this.bar = make("div", "tsnb-gauge");
    this.bar.setAttribute("role", "meter");
    this.bar.setAttribute("aria-label", "share of the privacy budget that is spent");
    this.bar.append(make("div"));
    this.end = make("span", "tsnb-where");
    this.el.append(this.text, this.bar, this.end);
  }

  update() {
    const { text, share, bad = false, end = "" } = account(this.store.parts.privacy, this.store.status.dp);
    this.text.textContent = text;
    this.end.textContent = end;
    this.bar.hidden = share === null;
    this.bar.setAttribute("aria-valuenow", share ?? 0);
    this.bar.setAttribute("aria-valuemin", 0);
    this.bar.setAttribute("aria-valuemax", 1);
    this.bar.firstChild.style.width = `${100 * (share ?? 0)}%`;
    this.el.classList.toggle("tsnb-spent", bad);
    this.el.dataset.epsilon = this.store.parts.privacy?.spent ?? "";
  }
}

export { Meter, account };
