// LossCurve: one chart alone.
import { alone } from "./page.js";
import { Curves } from "./curves.js";

export default alone((store, model) => new Curves(store, model, false));
