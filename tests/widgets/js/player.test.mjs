import assert from "node:assert/strict";
import { test } from "node:test";
import { TapeModel, TapeStore, addedUp, timeText } from "../../../tensafe_nb/widgets/static/player.js";

const delta = (offset, steps, values, step) => ({ t: "delta", s: { loss: [offset, steps, values] }, step });

function told(messages) {
  const store = new TapeStore(() => {}, 0.5, () => 0);
  for (const message of messages) store.receive(message);
  return store;
}

test("what was told message by message adds up to the same", () => {
  const messages = [
    { t: "status", state: "RUNNING", step: 0, n: 0 }, delta(0, [1], [4], 1), { t: "rows", rows: [] },
    delta(1, [2, 3], ["nan", 2], 3), { t: "rows", rows: [1] }, { t: "status", state: "FINISHED", step: 3, n: 3 },
  ];
  const [one, all] = [told(messages), told(addedUp(messages))];
  for (const store of [one, all]) {
    const { steps, values, n } = store.get("loss");
    assert.deepEqual([...steps.subarray(0, n)], [1, 2, 3]);
    assert.deepEqual([...values.subarray(0, n)], [4, NaN, 2]);
    assert.deepEqual([store.status.state, store.status.step], ["FINISHED", 3]);
    assert.deepEqual(store.parts.rows.rows, [1]);
  }
});

test("a step that came after the last status counts", () => {
  const store = told(addedUp([{ t: "status", state: "RUNNING", step: 1 }, delta(0, [1, 2], [4, 3], 2)]));
  assert.equal(store.status.step, 2);
  assert.deepEqual(addedUp([]), []);
});

test("a tape that is wound back is forgotten", () => {
  const store = told([delta(0, [1], [4], 1), { t: "alarms", alarms: [1] }, { t: "spans", spans: { loss: [[0, 1]] } }, { t: "rollouts", step: 1, groups: [] }]);
  store.forget();
  assert.equal(store.points, 0);
  assert.deepEqual([store.parts, store.status, store.spans, store.newest, store.rollouts.size], [{}, {}, {}, undefined, 0]);
});

test("whoever listens to a trait hears of it, and of no other", () => {
  const heard = [];
  const model = new TapeModel({ smoothing: 0.8, log_scale: false }, () => {});
  model.on("change:smoothing", () => heard.push("smoothing"));
  model.on("change", () => heard.push("any"));
  model.set("log_scale", true);
  model.set("smoothing", 0);
  assert.deepEqual(heard, ["any", "smoothing", "any"]);
  assert.equal(model.get("smoothing"), 0);
});

test("moments are read as long as the run is", () => {
  assert.equal(timeText(3.25, 12), "3.3 s");
  assert.equal(timeText(3.25, 600), "3 s");
  assert.equal(timeText(125, 600), "2:05");
});
