// PrivacyMeter: the account alone.
import { alone } from "./alone.js";
import { Meter } from "./meter.js";

export default alone((store) => new Meter(store));
