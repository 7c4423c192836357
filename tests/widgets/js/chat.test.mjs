import assert from "node:assert/strict";
import test from "node:test";
import { ChatLine, likely } from "../../../tensafe_nb/widgets/static/chat.js";

function page() {
  const sent = [];
  const line = new ChatLine((content) => sent.push(content), () => 0, () => {});
  return { line, sent };
}

const said = (o, p, more = {}) => ({ t: "said", i: 3, c: 0, o, p, v: 0, of: 1, ...more });

test("pieces add up, another answer begins anew, and an edit drops what came after", () => {
  const { line } = page();
  line.receive({ t: "begin", first: 3 });
  line.receive({ t: "turn", i: 3, said: "hello" });
  line.receive(said(0, [["a", -0.5]]));
  line.receive(said(1, [["b", -0.5], ["c", -1]], { end: "stop" }));
  assert.deepEqual(line.turns.get(3).answers[0].pieces.map(([text]) => text), ["a", "b", "c"]);
  assert.equal(line.turns.get(3).answers[0].end, "stop");
  line.receive(said(0, [["d", -1]], { v: 1, of: 2 }));
  assert.deepEqual(line.turns.get(3).answers[0].pieces, [["d", -1]]);
  line.receive({ t: "turn", i: 4, said: "more" });
  line.receive({ t: "cut", n: 4 });
  assert.deepEqual([...line.turns.keys()], [3]);
});

test("a page that missed a piece, or a turn, says hello", () => {
  const { line, sent } = page();
  line.receive(said(0, [["a", -0.5]]));
  line.receive({ t: "turn", i: 3, said: "hello" });
  line.receive(said(5, [["b", -0.5]]));
  assert.deepEqual(sent.map(({ t }) => t), ["hello", "hello"]);
});

test("whoever asked is told once whether it was refused", () => {
  const { line, sent } = page();
  const told = [];
  line.ask("say", { text: "x" }, (why) => told.push(why));
  line.receive({ t: "ack", n: sent[0].n, why: "The chat is still answering." });
  line.receive({ t: "ack", n: sent[0].n, why: null });
  assert.deepEqual(told, ["The chat is still answering."]);
});

test("probabilities have four levels, in words as well", () => {
  assert.deepEqual([-0.1, -1, -3, -9].map((value) => likely([value]).level), [0, 1, 2, 3]);
  assert.equal(likely([-2.1]).words, "probability 12 %, log-probability −2.10");
  assert.equal(likely([-12]).words, "probability under 0.01 %, log-probability −12.00");
  assert.equal(likely([-1, -3]).words, "probability 14 %, log-probability −1.00, −3.00");
});
