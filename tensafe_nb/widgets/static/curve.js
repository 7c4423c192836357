// LossCurve: one chart alone.
import { alone } from "./alone.js";
import { Curves } from "./curves.js";

export default alone((store, model) => new Curves(store, model, false));
