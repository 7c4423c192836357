// The frame of a widget that stands alone.
import { connect } from "./wire.js";
import { Note, explain, make } from "./page.js";
import { LAST_WORD, Place, asking } from "./place.js";

// The code of a widget that is one part: `build(store, model)` returns something with el, update and perhaps destroy.
function alone(build) {
  return () => {
    let store;
    return {
      initialize({ model }) {
        store = connect(model);
      },
      render({ model, el }) {
        const [part, note] = [build(store, model), new Note(store)];
        const root = make("section", "tsnb-panel tsnb-alone");
        root.setAttribute("aria-label", model.get("title"));
        root.dataset.lmSuppressShortcuts = "true";
        root.append(note.el, part.el);
        el.append(root);
        const place = new Place(root, el);
        const say = () => {
          const doubt = store.cut ? LAST_WORD : store.status.curve ? place.outdated(store.status.hint) : store.tries > 1 ? asking(store, store.now()) : "";
          root.dataset.doubt = store.cut ? "NO KERNEL" : "";
          note.update("", doubt);
          explain(root, store.parts.words);
        };
        const update = () => {
          root.dataset.points = store.points;
          root.dataset.acked = store.acked;
          say();
          part.update();
        };
        store.listeners.add(update);
        const timer = setInterval(say, 500);
        update();
        return () => {
          clearInterval(timer);
          place.destroy();
          store.listeners.delete(update);
          part.destroy?.();
        };
      },
    };
  };
}

export { alone };
