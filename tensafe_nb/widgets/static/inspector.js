// RolloutInspector: the samples alone.
import { alone } from "./alone.js";
import { Samples } from "./samples.js";

export default alone((store, model) => new Samples(store, model));
