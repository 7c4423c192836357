// A comparison in a page without a kernel, as it stood when the page was saved; widgets/page.py writes what it shows.
import { Store } from "./wire.js";
import { ComparisonView } from "./comparison.js";
import { followScheme } from "./scheme.js";

function showRaces() {
  const views = [...document.querySelectorAll(".tsnb-raced")].map((el) => {
    const { title, messages } = JSON.parse(el.querySelector("script").textContent);
    const traits = { title, smoothing: 0, log_scale: false, x_axis: "step", selected_step: null };
    const store = new Store(() => {}, 0);
    for (const message of messages) store.receive(message);
    const set = (name, value) => {
      traits[name] = value;
      store.tell();
    };
    return new ComparisonView(store, { get: (name) => traits[name], set, on() {}, save_changes() {} }, el);
  });
  addEventListener("beforeprint", () => views.forEach(({ chart }) => chart?.draw())); // also those that are not on the screen
  followScheme();
}

if (typeof document !== "undefined") showRaces();
