// RewardHistory: all the charts of a run with rewards.
import { alone } from "./alone.js";
import { Curves } from "./curves.js";

export default alone((store, model) => new Curves(store, model, true));
