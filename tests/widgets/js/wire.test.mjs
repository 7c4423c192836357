import assert from "node:assert/strict";
import { test } from "node:test";
import { Series, Store, connect, parseNumber } from "../../../tensafe_nb/widgets/static/wire.js";

function bytes(Type, values) {
  const padded = new Uint8Array(3 + values.length * 4); // not aligned, as in a real message
  const column = new Type(values);
  padded.set(new Uint8Array(column.buffer), 3);
  return new DataView(padded.buffer, 3, values.length * 4);
}

function full(name, offset, steps, values, extra = {}) {
  return [{ t: "full", name, o: offset, ...extra }, [bytes(Uint32Array, steps), bytes(Float32Array, values)]];
}

function store() {
  const sent = [];
  const clock = { now: 0 };
  const made = new Store((content) => sent.push(content), 0.5, () => clock.now);
  return { store: made, sent, clock };
}

test("binary columns and deltas add up", () => {
  const { store: page } = store();
  page.receive(...full("loss", 0, [1, 2], [4, 3], { new: true }));
  page.receive({ t: "delta", s: { loss: [2, [3], [2]] }, step: 3 });
  const { steps, values, n } = page.get("loss");
  assert.deepEqual([...steps.subarray(0, n)], [1, 2, 3]);
  assert.deepEqual([...values.subarray(0, n)], [4, 3, 2]);
  assert.equal(page.status.step, 3);
});

test("a gap is answered by hello, once in two seconds, and the rest is kept", () => {
  const { store: page, sent, clock } = store();
  clock.now = 5000;
  page.receive({ t: "delta", s: { loss: [7, [8], [1]] } });
  page.receive({ t: "delta", s: { loss: [8, [9], [1]] } });
  assert.deepEqual(sent, [{ t: "hello", v: 1, n: 0 }]);
  assert.equal(page.get("loss").n, 0);
  clock.now += 2000;
  page.receive({ t: "delta", s: { loss: [9, [10], [1]] } });
  assert.equal(sent.length, 2);
});

test("a status that counts more points than there are is answered by hello", () => {
  const { store: page, sent } = store();
  page.receive(...full("loss", 0, [1], [4]));
  page.receive({ t: "status", n: 1 });
  assert.equal(sent.length, 0);
  page.receive({ t: "status", n: 2 });
  assert.equal(sent.length, 1);
});

test("starting over replaces every series", () => {
  const { store: page } = store();
  page.receive(...full("loss", 0, [1], [4]));
  page.receive(...full("reward", 0, [1], [0.5], { new: true }));
  assert.equal(page.get("loss").n, 0);
  assert.equal(page.get("reward").n, 1);
});

test("non-finite numbers arrive by name, count as broken and do not enter the mean", () => {
  assert.ok(Number.isNaN(parseNumber("nan")));
  assert.equal(parseNumber("-inf"), -Infinity);
  const { store: page } = store();
  page.receive({ t: "delta", s: { loss: [0, [1, 2, 3], [2, "nan", "inf"]] } });
  const series = page.get("loss");
  assert.equal(series.bad, 2);
  assert.equal(series.smooth[2], 2);
});

test("the smoothed curve is unbiased and follows a new weight", () => {
  const series = new Series(0.5);
  series.append([1, 2], [0, 1]);
  assert.ok(Math.abs(series.smooth[1] - 2 / 3) < 1e-12);
  series.resmooth(0);
  assert.deepEqual([...series.smooth.subarray(0, 2)], [0, 1]);
});

test("a series grows beyond its first room", () => {
  const series = new Series(0.9);
  for (let i = 0; i < 1000; i++) series.append([i], [i]);
  assert.equal(series.n, 1000);
  assert.equal(series.values[999], 999);
});

test("commands are numbered, wait for their answer, and keep its reason", () => {
  const { store: page, sent } = store();
  page.command("pause");
  assert.deepEqual(sent, [{ t: "do", do: "pause", n: 1 }]);
  assert.equal(page.pending.size, 1);
  page.receive({ t: "ack", n: 1, why: "The run has ended: FINISHED." });
  assert.equal(page.pending.size, 0);
  assert.equal(page.acked, 1);
  assert.match(page.refusal, /has ended/);
});

test("a store is tied to its model and says hello", () => {
  const handlers = {};
  const sent = [];
  const model = { get: () => 0.7, on: (name, handler) => (handlers[name] = handler), send: (content) => sent.push(content) };
  const page = connect(model);
  assert.deepEqual(sent, [{ t: "hello", v: 1, n: 0, mount: page.page }]);
  handlers["msg:custom"]({ t: "status", state: "READY" }, []);
  assert.equal(page.status.state, "READY");
});

test("a kernel that does not answer is asked again, after twice as long each time, half a minute at most", () => {
  const [sent, waits, clock] = [[], [], { now: 0 }];
  let next;
  const later = (work, wait) => {
    waits.push(wait);
    next = () => {
      clock.now += wait;
      work();
    };
  };
  const page = new Store((content) => sent.push(content), 0.5, () => clock.now, later);
  page.greet();
  for (let i = 0; i < 6; i++) next();
  assert.deepEqual(waits, [1000, 2000, 4000, 8000, 16000, 30000, 30000]);
  assert.equal(new Set(sent.map((hello) => hello.mount)).size, 1); // it is one page all the while
  page.receive({ t: "status", state: "READY" });
  next();
  assert.equal(sent.length, 7);
  page.greet(); // it has fallen silent
  assert.equal(waits.at(-1), 1000);
});

test("a page whose line is closed knows it, until something is heard", () => {
  const page = new Store(() => { throw new Error("closed"); }, 0.5, () => 0, () => {});
  page.greet();
  assert.equal(page.cut, true);
  page.command("pause");
  assert.match(page.refusal, /no line to the kernel/);
  assert.equal(page.pending.size, 0);
  page.receive({ t: "status", state: "READY" });
  assert.equal(page.cut, false);
});

test("what a loaded state gave up is parted from the curve before anything new is measured", () => {
  const { store: page } = store();
  page.receive({ t: "delta", s: { loss: [0, [1, 2, 3, 4], [9, 8, 7, 6]] } });
  page.receive({ t: "spans", spans: { loss: [[0, 2], [4, null]] } });
  assert.deepEqual([...page.get("loss").current.steps.subarray(0, 2)], [1, 2]);
  assert.equal(page.get("loss").current.n, 2);
  assert.deepEqual(pieces(page.get("loss")), [[[3, 7], [4, 6]]]);
  page.receive({ t: "spans", spans: { loss: [[0, null]] } });
  assert.equal(page.get("loss").current.n, 4);
  page.receive({ t: "spans", spans: { "eval/loss": [[1, null]] } }); // before its points
  page.receive({ t: "delta", s: { "eval/loss": [0, [1, 2], [5, 4]] } });
  assert.equal(page.get("eval/loss").current.n, 1);
  assert.equal(page.get("loss").current.n, 4);
});

const pieces = (series) => series.current.abandoned.map(({ steps, values, n }) => Array.from({ length: n }, (_, i) => [steps[i], values[i]]));

test("nothing is averaged across a change of the reward", () => {
  const { store: page } = store();
  page.receive({ t: "delta", s: { reward: [0, [1, 2, 3], [8, 8, 0]], loss: [0, [1, 2, 3], [8, 8, 0]] } });
  page.receive({ t: "marks", marks: [[3, "v", "2"]] });
  assert.equal(page.get("reward").smooth[2], 0);
  assert.ok(page.get("loss").smooth[2] > 1);
  page.receive({ t: "delta", s: { reward: [3, [4], [0]] } });
  assert.equal(page.get("reward").smooth[3], 0);
});

test("parts and rollouts are kept, the newest eight steps of them", () => {
  const { store: page, sent } = store();
  page.receive({ t: "rows", rows: [{ id: "art-1" }], saving: 0 });
  assert.equal(page.parts.rows.rows.length, 1);
  for (let step = 1; step <= 10; step++) page.receive({ t: "rollouts", step, groups: [] });
  assert.deepEqual([page.rollouts.size, page.newest], [8, 10]);
  page.show(10);
  page.show(1);
  assert.deepEqual(sent, [{ t: "show", step: 1 }]);
});

test("after a rollback the curve is the branch that is trained, and what was abandoned lies beside it", () => {
  const series = new Series(0.5);
  series.append([1, 2, 3, 4], [8, 7, 6, 5]);
  assert.equal(series.current, series);
  series.append([3, 4], [3, 2]);
  assert.deepEqual([...series.current.steps.subarray(0, series.current.n)], [1, 2, 3, 4]);
  assert.deepEqual([...series.current.values.subarray(0, series.current.n)], [8, 7, 3, 2]);
  assert.deepEqual(pieces(series), [[[3, 6], [4, 5]]]);
  const straight = new Series(0.5);
  straight.append([1, 2, 3, 4], [8, 7, 3, 2]);
  assert.deepEqual(series.current.smooth.subarray(0, 4), straight.smooth.subarray(0, 4));
  series.append([2, 3], [1, 0]); // back again, beyond the first time
  assert.deepEqual([...series.current.values.subarray(0, series.current.n)], [8, 1, 0]);
  assert.deepEqual(pieces(series), [[[3, 3], [4, 2]], [[2, 7], [3, 6], [4, 5]]]);
  assert.equal(series.n, 8);
});
