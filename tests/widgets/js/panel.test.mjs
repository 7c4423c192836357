import assert from "node:assert/strict";
import { test } from "node:test";
import { clockText, details, doubt, freshness, leftText, offers, verdict, worst } from "../../../tensafe_nb/widgets/static/panel.js";
import { asking, wordsOf } from "../../../tensafe_nb/widgets/static/place.js";

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
  for (const state of ["RUNNING", "PAUSED", "FINISHED"]) assert.deepEqual(offers({ ...RUNNING, state, line: "LOST" }), []);
  assert.deepEqual(offers({ ...RUNNING, line: "RECONNECTING" }), ["pause", "stop", "checkpoint"]);
  assert.deepEqual(offers({ ...RUNNING, foreign: true }), ["checkpoint"]);
});

test("of several alarms the newest of the worst comes first", () => {
  const [amber, red, later] = [{ level: "amber", step: 1 }, { level: "red", step: 2 }, { level: "amber", step: 3 }];
  assert.equal(worst([]), null);
  assert.equal(worst([amber, later]), later);
  assert.equal(worst([amber, red, later]), red);
});

test("silence is called stale after twelve seconds, and only while something is under way", () => {
  assert.equal(freshness(RUNNING, 200), "live · last update 0.2 s ago");
  assert.equal(freshness(RUNNING, 12_400), "STALE: no news for 12 s; asking the kernel again");
  assert.equal(freshness({ ...RUNNING, active: false }, 60_000), "up to date");
  assert.match(freshness({ ...RUNNING, line: "LOST" }, 100), /nothing comes from the server/);
  assert.match(freshness({ ...RUNNING, run_id: "tc-1/1" }, 0, true), /lost its kernel.*tn\.load_run\("tc-1\/1"\)/);
});

test("a page that waits for the kernel says how often it has asked, and when it asks again", () => {
  assert.equal(asking({ tries: 1, again: 1000, cut: false }, 0), "waiting for the kernel");
  assert.equal(asking({ tries: 3, again: 4000, cut: false }, 500), "waiting for the kernel: asked 3 times, again in 4 s");
  assert.match(asking({ tries: 3, again: 4000, cut: true }, 0), /no kernel/);
});

test("what is shown is doubted where nothing was heard, or the line is broken", () => {
  assert.equal(doubt(RUNNING, 1000), "");
  assert.equal(doubt(RUNNING, 13_000), "STALE");
  assert.equal(doubt({ ...RUNNING, active: false }, 13_000), "");
  assert.equal(doubt({ ...RUNNING, line: "RECONNECTING" }, 0), "RECONNECTING");
  assert.equal(doubt({ ...RUNNING, line: "OPEN" }, 0), "");
  assert.equal(doubt(RUNNING, 0, true), "NO KERNEL");
  assert.equal(doubt({ ...RUNNING, foreign: true, silent: 59 }, 0), "");
  assert.equal(doubt({ ...RUNNING, foreign: true, silent: 61 }, 0), "SILENT");
  assert.match(freshness({ ...RUNNING, foreign: true, silent: 75 }, 0), /has told nothing for 01:15: its kernel may/);
});

test("that no problem was found is said of a run that was looked at and is whole, and of no other", () => {
  const none = /no problem found/;
  assert.match(verdict(RUNNING, [], "").text, none);
  assert.match(verdict({ ...RUNNING, state: "FINISHED" }, [], "").text, none);
  for (const state of ["FAILED", "INTERRUPTED"]) {
    const said = verdict({ ...RUNNING, state }, [], "");
    assert.equal(said.level, "red");
    assert.doesNotMatch(said.text, none);
  }
  assert.match(verdict({ ...RUNNING, state: "FAILED" }, [{ level: "red" }], "").text, /has failed at step 214/);
  assert.match(verdict({ ...RUNNING, client: "ERROR", state: "ERROR", run: null }, [], "").text, /client has failed/);
  for (const word of ["STALE", "RECONNECTING", "LOST", "NO KERNEL"]) assert.match(verdict(RUNNING, [], word).text, /not known/);
  assert.equal(verdict({ ...RUNNING, step: 0 }, [], "").text, ""); // nothing was looked at yet
  assert.equal(verdict({ state: "READY", client: "READY", step: 3 }, [], "").text, "");
  assert.equal(verdict({ ...RUNNING, state: "STOPPED", reason: "the budget" }, [], "").text, "");
  assert.equal(verdict(RUNNING, [{ level: "amber" }], "").text, "");
  assert.match(verdict(RUNNING, [], "", { void: "noise was switched off" }).text, /no privacy guarantee/);
  assert.match(verdict(RUNNING, [], "", { void: null }).text, none);
});

test("a client that went back after the end of its run is said to stand there", () => {
  assert.ok(details({ ...RUNNING, state: "FINISHED", now: { step: 50, loaded: "art-a" } }, 0).includes("client at step 50"));
});

test("a picture tells its words, and any other image none", () => {
  const chunk = (name, data) => [0, 0, data.length >> 8, data.length & 255, ...Buffer.from(name), ...data, 0, 0, 0, 0];
  const png = (...chunks) => `data:image/png;base64,${Buffer.from([137, 80, 78, 71, 13, 10, 26, 10, ...chunks.flat()]).toString("base64")}`;
  const words = chunk("iTXt", [...Buffer.from("Description\0\0\0\0\0Run 1: PAUSED at step 3, ε 2")]);
  assert.equal(wordsOf(png(chunk("IHDR", Array(13).fill(0)), words, chunk("IDAT", [1]))), "Run 1: PAUSED at step 3, ε 2");
  assert.equal(wordsOf(png(chunk("IHDR", Array(13).fill(0)), chunk("IDAT", [1]), words)), null);
  assert.equal(wordsOf("https://example.org/a.png"), null);
});
