import assert from "node:assert/strict";
import { test } from "node:test";
import { clockText, details, freshness, leftText, offers, worst } from "../../../tensafe_nb/widgets/static/panel.js";

const RUNNING = { state: "RUNNING", client: "BUSY", run: "1", step: 214, of: 500, elapsed: 252, eta: 300, queue: 3, active: true, steer: true };

test("the badge's facts stand most important first", () => {
  assert.deepEqual(details(RUNNING, 0), ["step 214/500", "04:12", "~5 min left", "3 in the queue"]);
});

test("time goes on between two messages, while a run is under way", () => {
  assert.equal(details(RUNNING, 8)[1], "04:20");
  assert.equal(details({ ...RUNNING, active: false, ended: true }, 8)[1], "04:12");
});

test("only an operation that takes long is named", () => {
  assert.ok(!details({ ...RUNNING, op: "sample", op_s: 0.3 }, 0).join().includes("sample"));
  assert.ok(details({ ...RUNNING, op: "sample", op_s: 1.2 }, 0).includes("sample 1.2 s"));
});

test("what is unknown is a dash, or is left out", () => {
  assert.deepEqual(details({ step: 7, active: true }, 0), ["step 7", "—"]);
  assert.equal(leftText(null), "");
  assert.equal(clockText(3725), "1:02:05");
});

test("buttons follow the state, and a recording has none", () => {
  assert.deepEqual(offers(RUNNING), ["pause", "stop", "checkpoint"]);
  assert.deepEqual(offers({ ...RUNNING, state: "PAUSED" }), ["resume", "stop", "checkpoint"]);
  assert.deepEqual(offers({ ...RUNNING, state: "FINISHED", ended: true, queue: 0 }), ["checkpoint"]);
  assert.deepEqual(offers({ state: "BUSY", client: "BUSY", queue: 2, steer: true }), ["cancel", "checkpoint"]);
  assert.deepEqual(offers({ ...RUNNING, client: "TERMINATED" }), []);
  assert.deepEqual(offers({ ...RUNNING, steer: false }), []);
});

test("of several alarms the newest of the worst comes first", () => {
  const [amber, red, later] = [{ level: "amber", step: 1 }, { level: "red", step: 2 }, { level: "amber", step: 3 }];
  assert.equal(worst([]), null);
  assert.equal(worst([amber, later]), later);
  assert.equal(worst([amber, red, later]), red);
});

test("silence is called stale after twelve seconds, and only while something is under way", () => {
  assert.equal(freshness(RUNNING, 200), "live · last update 0.2 s ago");
  assert.equal(freshness(RUNNING, 12_400), "STALE: no news for 12 s");
  assert.equal(freshness({ ...RUNNING, active: false }, 60_000), "up to date");
  assert.equal(freshness({}, 0), "waiting for the kernel");
});
