// CheckpointTable: the table alone.
import { alone } from "./page.js";
import { Checkpoints } from "./table.js";

export default alone((store) => new Checkpoints(store));
