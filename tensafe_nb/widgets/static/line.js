// A page's line to its widget in the kernel: says hello until it is answered, numbers what is asked, and knows when it is
// cut. What comes is for whoever extends it to take.

const PROTOCOL = 1;
const FIRST_MS = 1000; // until a kernel that has not answered is asked again; then twice as long each time
const LONGEST_MS = 30000;

// `send` posts to the kernel; whoever is in `listeners` is called after every message.
class Line {
  constructor(send, now = () => performance.now(), later = (work, wait) => setTimeout(work, wait)) {
    Object.assign(this, { send, now, later, asked: -Infinity, tries: 0, again: null, answered: false, cut: false });
    this.page = Math.random().toString(36).slice(2, 10);
    this.status = {};
    this.error = this.refusal = this.said = null;
    this.pending = new Map(); // number of a command → when it was given
    this.given = this.acked = 0;
    this.heardAt = now();
    this.listeners = new Set();
  }

  // How much a page holds, as it says hello.
  get size() {
    return 0;
  }

  // Says hello, as this page, until the kernel answers: after 1, 2, 4 … 30 s. Begins anew when it has fallen silent.
  greet() {
    this.answered = false;
    this.asked = this.now();
    const wait = Math.min(FIRST_MS * 2 ** this.tries, LONGEST_MS);
    this.tries++;
    this.again = this.now() + wait;
    try {
      this.send({ t: "hello", v: PROTOCOL, n: this.size, mount: this.page });
    } catch {
      this.cut = true; // the line is closed: its kernel was restarted, or is gone
    }
    this.later(() => this.answered || this.greet(), wait);
    this.tell();
  }

  command(what, more = {}) {
    this.given++;
    this.pending.set(this.given, this.now());
    this.error = this.refusal = this.said = null;
    try {
      this.send({ t: "do", do: what, n: this.given, ...more });
    } catch {
      this.pending.delete(this.given);
      this.cut = true;
      this.refusal = `${what}: this page has no line to the kernel any more. Run the cell again.`;
    }
    this.tell();
  }

  receive(message, buffers = []) {
    this.heardAt = this.now();
    this.answered = true;
    this.cut = false;
    this.tries = 0;
    if (message.t === "ack") this.takeAnswer(message);
    else if (message.t === "error") this.error = message.text;
    else this.take(message, buffers);
    this.tell();
  }

  takeAnswer(message) {
    this.pending.delete(message.n);
    this.acked = message.n;
    this.refusal = message.why;
    this.said = message.said;
  }

  tell() {
    for (const listener of this.listeners) listener(this);
  }
}

// Ties a widget's model to a line, once per page; returns the line.
function tie(model, line) {
  model.on("msg:custom", (message, buffers) => line.receive(message, buffers));
  model.on("change", () => line.tell());
  model.on("comm_live_update", () => {
    line.cut = true; // until something is heard
    line.tell();
  });
  line.greet();
  return line;
}

export { Line, PROTOCOL, tie };
