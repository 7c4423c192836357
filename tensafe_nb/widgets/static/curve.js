// LossCurve: the chart alone.
import { connect } from "./wire.js";
import { Chart, make } from "./chart.js";

export default () => {
  let store;
  return {
    initialize({ model }) {
      store = connect(model);
    },
    render({ model, el }) {
      const chart = new Chart(store);
      const root = make("section", "tsnb-panel tsnb-alone");
      root.setAttribute("aria-label", `Curve of ${model.get("title")}`);
      root.dataset.lmSuppressShortcuts = "true";
      root.append(chart.el);
      el.append(root);
      const update = () => {
        root.dataset.points = store.get(chart.name).n;
        chart.describe();
        chart.schedule();
      };
      store.listeners.add(update);
      update();
      return () => {
        store.listeners.delete(update);
        chart.destroy();
      };
    },
  };
};
