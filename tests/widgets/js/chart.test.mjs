import assert from "node:assert/strict";
import { test } from "node:test";
import { bandOf, columnPath, extent, logTicks, lowerBound, nearest, niceTicks, positions, rangeOf, summary, tickText } from "../../../tensafe_nb/widgets/static/chart.js";
import { numberText } from "../../../tensafe_nb/widgets/static/page.js";
import { Series } from "../../../tensafe_nb/widgets/static/wire.js";

const same = (x) => x;

test("ticks are round and lie inside", () => {
  const { ticks, step } = niceTicks(3.97, 8.93, 5);
  assert.equal(step, 1);
  assert.deepEqual(ticks, [4, 5, 6, 7, 8]);
  assert.deepEqual(niceTicks(0, 0.03, 3).ticks.map((t) => tickText(t, 0.01)), ["0.00", "0.01", "0.02", "0.03"]);
});

test("numbers have four digits, and the rest is said in words", () => {
  assert.equal(numberText(2.345678), "2.346");
  assert.equal(numberText(0.0000123), "1.23e-5");
  assert.equal(numberText(0), "0.000");
  assert.equal(numberText(NaN), "not a number");
  assert.equal(numberText(-Infinity), "−∞");
});

test("what is constant lies in the middle, and its rounding is not blown up", () => {
  assert.deepEqual(rangeOf([1, 3]), [1, 3]);
  const [low, high] = rangeOf([2.3, 2.3 + 1e-9]);
  assert.ok(low < 2.28 && high > 2.32);
  assert.deepEqual(rangeOf([0, 0]), [0, 1]);
  assert.deepEqual(rangeOf(null), [0, 1]);
  assert.deepEqual(rangeOf([5, 5], true), [2.5, 10]);
  assert.deepEqual(rangeOf([1, 1000], true), [1, 1000]);
  assert.deepEqual(rangeOf([-4, -4]), [-4.04, -3.96]);
});

test("a band is the mean and its spread at the same step, and has gaps where there is none", () => {
  const [mean, spread] = [new Series(0), new Series(0)];
  mean.append([1, 2, 4], [5, 6, 7]);
  spread.append([2, 3, 4], [1, 9, 2]);
  const { low, high } = bandOf(mean, spread);
  assert.deepEqual([...low], [NaN, 5, 5]);
  assert.deepEqual([...high], [NaN, 7, 9]);
});

test("ticks of large numbers are short", () => {
  assert.deepEqual([20_000, 2e7, 1_500_000].map((t) => tickText(t, 1e4)), ["20k", "20M", "1.5M"]);
});

test("an extent skips what is not finite, and what a logarithm cannot show", () => {
  assert.deepEqual(extent([[[1, NaN, 5, Infinity], 0, 4]]), [1, 5]);
  assert.deepEqual(extent([[[9, 1, 5], 1, 3], [[3], 0, 1]]), [1, 5]);
  assert.deepEqual(extent([[[-1, 0, 5], 0, 3]], 0), [5, 5]);
  assert.equal(extent([[[NaN], 0, 1]]), null);
});

test("a spike of one step survives among 100,000 points", () => {
  const n = 100_000;
  const steps = Float64Array.from({ length: n }, (_, i) => i);
  const values = new Float64Array(n);
  values[40_000] = 7;
  values[40_003] = -5;
  const path = columnPath(steps, values, 0, n, { a: 800 / n, b: 0 }, same);
  const drawn = path.filter((_, i) => i % 2);
  assert.ok(path.length <= 2 * 2 * 2 * 801);
  assert.equal(Math.max(...drawn), 7);
  assert.equal(Math.min(...drawn), -5);
});

test("a path steps over what is not finite", () => {
  assert.deepEqual(columnPath([1, 2, 3], [5, NaN, 6], 0, 3, { a: 1, b: 0 }, same), [1, 5, 3, 6]);
  assert.deepEqual(columnPath([1, 2, 3], [5, 0, 6], 0, 3, { a: 1, b: 0 }, same, 0), [1, 5, 3, 6]);
});

test("a million points take less than a frame's time", () => {
  const n = 1_000_000;
  const steps = Float64Array.from({ length: n }, (_, i) => i);
  const values = Float64Array.from({ length: n }, (_, i) => Math.sin(i));
  columnPath(steps, values, 0, n, { a: 800 / n, b: 0 }, same);
  const started = performance.now();
  for (let i = 0; i < 10; i++) columnPath(steps, values, 0, n / 10, { a: 8000 / n, b: 0 }, same);
  assert.ok((performance.now() - started) / 10 < 16);
});

test("the nearest point is found", () => {
  const steps = [0, 10, 20, 30];
  assert.equal(nearest(steps, 4, 14), 1);
  assert.equal(nearest(steps, 4, 16), 2);
  assert.equal(nearest(steps, 4, -5), 0);
  assert.equal(nearest(steps, 4, 99), 3);
});

test("a curve is told in words", () => {
  const series = new Series(0);
  assert.equal(summary("loss", series), "loss: no values yet");
  for (let i = 1; i <= 60; i++) series.append([i], [i < 30 ? 5 - i / 10 : 2]);
  assert.equal(summary("loss", series), "loss fell from 4.900 to 2.000 over 60 steps, last 20 flat");
  series.append([61], [NaN]);
  assert.match(summary("loss", series), /1 values not finite$/);
});

test("a logarithmic axis has powers of ten, or steps between them", () => {
  assert.deepEqual(logTicks(0.5, 2000, 6), [1, 10, 100, 1000]);
  assert.deepEqual(logTicks(1, 20, 9), [1, 2, 5, 10, 20]);
  assert.ok(logTicks(3, 4, 4).length > 1);
});

test("points can lie over the tokens or seconds of their steps", () => {
  const [series, ruler] = [new Series(0), new Series(0)];
  series.append([1, 3], [9, 8]);
  ruler.append([1, 2, 3], [100, 200, 300]);
  assert.deepEqual([...positions(series, ruler)], [100, 300]);
  assert.equal(positions(series, null), series.steps);
  assert.equal(lowerBound([1, 3, 5], 3, 4), 2);
});
