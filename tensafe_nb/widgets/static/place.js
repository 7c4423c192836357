// Where a view stands in the notebook: beside the picture and the table that stay in the file.

const HEAD = 8192; // bytes of a PNG in which its words are looked for

const LAST_WORD = "this page has lost its kernel: what is shown is its last word";

// When a page that was not answered asks again.
function asking({ tries, again, cut }, now) {
  if (cut) return "there is no kernel behind this page any more: run the cell again";
  if (tries < 2) return "waiting for the kernel";
  return `waiting for the kernel: asked ${tries} times, again in ${Math.max(0, Math.ceil((again - now) / 1000))} s`;
}

// What a picture says of itself: its PNG holds, before its pixels, the words of its caption. Null for any other.
function wordsOf(source) {
  const [head, data] = source.split("base64,");
  if (!data || !head.startsWith("data:image/png")) return null;
  const text = data.slice(0, HEAD).replace(/\s/g, "");
  const bytes = Uint8Array.from(atob(text.slice(0, text.length - (text.length % 4))), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  for (let at = 8; at + 12 < bytes.length; at += 12 + view.getUint32(at)) {
    const name = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    if (name === "IDAT") return null;
    if (name !== "iTXt") continue;
    const fields = new TextDecoder().decode(bytes.subarray(at + 8, at + 8 + view.getUint32(at))).split("\0");
    if (fields[0] === "Description") return fields.at(-1); // keyword, flags, language, keyword again, text
  }
  return null;
}

// In a page that marimo has exported no kernel will ever answer: it shows the picture and the table beneath.
function unfold(el) {
  const fold = el.getRootNode().host?.closest("marimo-ui-element")?.nextElementSibling;
  if (fold?.tagName === "DETAILS") fold.open = true;
}

// A view's place: while it is there, the picture and the table of the same cell stay out of sight.
class Place {
  constructor(root, el) {
    this.root = root;
    this.watcher = new ResizeObserver(() => this.take());
    this.watcher.observe(el);
  }

  take() {
    const area = this.root.closest(".jp-OutputArea");
    if (!area || area === this.area) return;
    this.leave();
    this.area = area;
    area.classList.add("tsnb-live");
  }

  leave() {
    const others = this.area ? [...this.area.querySelectorAll(".tsnb-panel")].filter((root) => root !== this.root) : [];
    if (this.area && !others.length) this.area.classList.remove("tsnb-live");
  }

  // The words of the picture that the file holds here, or null.
  get words() {
    const images = this.area ? [...this.area.querySelectorAll("img")].map((image) => image.src) : [];
    return images.map(wordsOf).find(Boolean) ?? null;
  }

  // What to say of a file that the kernel cannot renew any more. `hint.last` are the words of a picture of the end.
  outdated(hint) {
    if (!hint) return "";
    const { words } = this;
    if (words && words === hint.last) return "";
    const held = words ? `The picture in this file is of an earlier moment (${words})` : "This file holds no picture of this training yet";
    return `${held}: the page was loaded again. ${hint.call ?? "run.freeze()"} in a new cell takes a fresh one.`;
  }

  destroy() {
    this.watcher.disconnect();
    this.leave();
  }
}

export { LAST_WORD, Place, asking, unfold, wordsOf };
