import assert from "node:assert/strict";
import { test } from "node:test";
import { hasNews, rowsOf, specs } from "../../../tensafe_nb/widgets/static/curves.js";
import { csvOf, fileName } from "../../../tensafe_nb/widgets/static/download.js";
import { account } from "../../../tensafe_nb/widgets/static/meter.js";
import { numberText, plainPieces, plainText, signed, sizeText } from "../../../tensafe_nb/widgets/static/page.js";
import { arranged, pairOf, paired, tokensOf } from "../../../tensafe_nb/widgets/static/samples.js";
import { metadataText, savedAt } from "../../../tensafe_nb/widgets/static/table.js";
import { Store } from "../../../tensafe_nb/widgets/static/wire.js";

const SPENT = { spent: 1.84, target: 8, delta: 1e-5, accountant: "rdp", adjacency: "add/remove one", projected: 13623, refused: null, void: null };

test("what cannot be seen, or turns text around, is shown as a code", () => {
  assert.equal(plainText("a\u202eb\u0000c\u200dd\nе"), "a⟨U+202E⟩b⟨U+0000⟩c⟨U+200D⟩d\nе");
  assert.equal(plainText("<img src=x>"), "<img src=x>");
  assert.equal(plainText("x\u{e0041}"), "x⟨U+E0041⟩");
});

test("a joiner is kept where it joins: in an emoji, and between letters that are written with it", () => {
  for (const text of ["👩‍👩‍👧", "❤️‍🔥", "می\u200cخواهم"]) assert.equal(plainText(text), text);
  assert.equal(plainText("a\u200c👩\u200d"), "a⟨U+200C⟩👩⟨U+200D⟩");
  assert.deepEqual(plainPieces(["می", "\u200c", "خواهم", "\u200d"]), ["می", "\u200c", "خواهم", "⟨U+200D⟩"]);
});

test("large numbers have the letter of their thousands", () => {
  assert.deepEqual([99_999, 123_456, 2e7, -3.25e9, 1e16].map((value) => numberText(value)), ["99999", "123.5k", "20.00M", "-3.250G", "1.00e+16"]);
});

test("groups with signal come first, otherwise as they came", () => {
  const groups = ["a", "b", "c", "d"].map((prompt, i) => ({ prompt, signal: i % 2 === 1, r: [] }));
  assert.deepEqual(arranged(groups, "sampled", "all", "").map((g) => g.prompt), ["b", "d", "a", "c"]);
});

test("the tokens of a conversation are those of the policy's turns", () => {
  assert.deepEqual(tokensOf({ tok: [["a", 1]] }), [["a", 1]]);
  assert.deepEqual(tokensOf({ turns: [{ who: "assistant", tok: [["a", 1]] }, { who: "tool" }, { who: "assistant", tok: [["b", 2]] }] }), [["a", 1], ["b", 2]]);
  assert.deepEqual(tokensOf({ text: "" }), []);
});

test("the same held-out prompts are compared, whatever order they came in", () => {
  const group = (id, mean) => ({ id, prompt: `${id}?`, mean, r: [] });
  const pairs = paired([group("a", 0), group("b", 0.5)], [group("b", 1), group("c", 0), group("a", 0)]);
  assert.deepEqual(pairs.map(([one, other]) => [one.id, one.mean, other.mean]), [["b", 0.5, 1], ["a", 0, 0]]);
  assert.deepEqual(paired([group("a", 0)], [group("a", 1)], "B"), []);
});

test("the first evaluation is compared with that of the chosen step, or the newest", () => {
  assert.deepEqual(pairOf([0, 20, 40]), [0, 40]);
  assert.deepEqual(pairOf([0, 20, 40], 33), [0, 20]);
  assert.deepEqual(pairOf([0, 20, 40], 3), [0, 20]);
});

test("what is idle is out of sight until it leaves zero", () => {
  const series = { n: 3, left: 0, values: [0, 0, 0, 0.1] };
  assert.equal(hasNews(series), true);
  assert.equal(hasNews(series, true), false);
  series.n = 4;
  assert.equal(hasNews(series, true), true);
  assert.equal(hasNews({ n: 0, left: 0, values: [] }), false);
});

test("a day is told where it is not today's", () => {
  const noon = new Date(2026, 4, 3, 12, 5, 9);
  assert.equal(savedAt(noon / 1000, noon), "12:05:09");
  assert.equal(savedAt(noon / 1000, new Date(2026, 4, 4)), "2026-05-03 12:05:09");
});

test("an advantage has a sign", () => {
  assert.deepEqual([0.5, -1.25, 0, null].map(signed), ["+0.50", "−1.25", "+0.00", "—"]);
});

test("without differential privacy the account says so and has no bar", () => {
  assert.deepEqual(account(undefined, false), { text: "DP off: this training is not differentially private", share: null });
  assert.equal(account(undefined, true).text, "ε —: no step taken yet");
});

test("the account tells what is spent of what, and where it will end", () => {
  const { text, share, end } = account(SPENT, true);
  assert.equal(text, "ε 1.84 of 8.00 at δ = 1e-5 (rdp, add/remove one)");
  assert.equal(share, 0.23);
  assert.equal(end, "reaches 8.00 at step 13,623");
  assert.equal(account({ ...SPENT, target: null, projected: null }, true).share, null);
});

test("a refused step and a void guarantee are said in words", () => {
  assert.match(account({ ...SPENT, refused: 40 }, true).end, /^step 41 was refused/);
  const gone = account({ ...SPENT, spent: "∞", void: "noise was switched off." }, true);
  assert.equal(gone.text, "ε ∞: no guarantee. noise was switched off.");
  assert.equal(gone.share, null);
});

test("samples are sorted and filtered", () => {
  const groups = [
    { prompt: "1+1=", signal: true, r: [{ text: "3", reward: 0, adv: -0.5, n: 2 }, { text: "2", reward: 1, adv: 0.5, n: 1 }] },
    { prompt: "2+2=", signal: false, r: [{ text: "x", reward: null, error: "no number", n: 1 }] },
  ];
  assert.deepEqual(arranged(groups, "reward", "with signal", "")[0].r.map((r) => r.text), ["2", "3"]);
  assert.deepEqual(arranged(groups, "sampled", "reward errors", "").map((g) => g.prompt), ["2+2="]);
  assert.deepEqual(arranged(groups, "length", "all", "1+").map((g) => g.r[0].text), ["3"]);
  assert.equal(groups[0].r[0].text, "3");
});

test("sizes and metadata are told in a few words", () => {
  assert.deepEqual([0, 999, 1200, 999_499, 999_600, 2_500_000, 3e9].map(sizeText), ["0 B", "999 B", "1.20 kB", "999 kB", "1.00 MB", "2.50 MB", "3.00 GB"]);
  assert.equal(metadataText({ note: "best", epoch: 3 }), "note: best, epoch: 3");
  assert.equal(metadataText(null), "—");
});

test("a table shows at most so many points, the newest always", () => {
  const steps = Array.from({ length: 250 }, (_, i) => i + 1);
  const rows = rowsOf(steps, steps, 250, { from: null }, 100);
  assert.ok(rows.length <= 100);
  assert.equal(rows.at(-1), 249);
  assert.deepEqual(rowsOf(steps, steps, 250, { from: 10, to: 12 }), [9, 10, 11]);
});

test("runs that are compared differ in colour, dash and label", () => {
  const [{ lines }] = specs("loss", ["run 1", "run 2", "run 3"], false);
  assert.deepEqual(lines.map((line) => line.name), ["loss", "1:loss", "2:loss"]);
  assert.equal(new Set(lines.map((line) => line.colour)).size, 3);
  assert.equal(new Set(lines.map((line) => String(line.dash))).size, 3);
  assert.equal(specs("reward", [], true).length, 8);
  assert.equal(specs("loss", [], true).length, 5);
});

test("a file holds every curve as it stands, a row for each step", () => {
  const store = new Store(() => {}, 0.8);
  store.receive({ t: "delta", s: { loss: [0, [1, 2, 3, 2], [5, 4, "nan", 3.5]], "eval/loss": [0, [0, 2], [6, 0.1234567]], "~time": [0, [1, 2, 3, 2], [0, 1, 2, 3]], empty: [0, [], []] } });
  assert.equal(csvOf(store, []), "step,loss,eval/loss,seconds\n0,,6,\n1,5,,0\n2,3.5,0.1234567,3\n");
});

test("a file of several runs says which is which, and its name what it is", () => {
  const store = new Store(() => {}, 0.8);
  store.receive({ t: "delta", s: { loss: [0, [1], ["inf"]], "1:loss": [0, [1], ["-inf"]], "by, group": [0, [1], ["nan"]] } });
  assert.equal(csvOf(store, ["lr 1", 'a "b"']), 'step,lr 1: loss,"a ""b"": loss","lr 1: by, group"\n1,inf,-inf,nan\n');
  assert.equal(fileName("tc-1 · tiny", { n: 3 }, 3), "tc-1.csv");
  assert.equal(fileName("tc-1 · tiny", { n: 3, run_id: "tc-1/2", dp: true }, 2), "tc-1-2.part.operator.csv");
});
