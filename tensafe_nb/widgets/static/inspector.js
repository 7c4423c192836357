// RolloutInspector: the samples alone.
import { alone } from "./page.js";
import { Samples } from "./samples.js";

export default alone((store, model) => new Samples(store, model));
