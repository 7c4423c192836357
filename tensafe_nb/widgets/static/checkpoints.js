// CheckpointTable: the table alone.
import { alone } from "./alone.js";
import { Checkpoints } from "./table.js";

export default alone((store) => new Checkpoints(store));
