// PrivacyMeter: the account alone.
import { alone } from "./page.js";
import { Meter } from "./meter.js";

export default alone((store) => new Meter(store));
