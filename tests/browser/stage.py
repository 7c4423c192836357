"""One of our widgets in a bare page: its kernel half is the real one, in this process; there is no Jupyter around it.

For what is about looks and access only: states are made in a moment, and each is seen in every theme and width.
"""

import base64
import json
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Locator, Page

from tensafe_nb.widgets.live.base import LiveWidget

from ..widgets.conftest import Wire

THEMES = Path(__import__("jupyterlab").__file__).parent / "themes" / "@jupyterlab"
HEIGHT = 1400
PAGE = """\
<!doctype html>
<html lang="en">
<head><title>stage</title><style id="theme"></style><style id="ours"></style>
<style>body { margin: 0; padding: 12px; background: var(--jp-layout-color0); }</style></head>
<body data-jp-theme-light="true"><main id="stage"></main></body>
</html>"""
MOUNT = """async ([code, css, traits]) => {
    document.getElementById("ours").textContent = css;
    const handlers = new Map();
    const fire = (name, ...what) => (handlers.get(name) ?? []).forEach((handler) => handler(...what));
    const bytes = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
    window.deliver = (messages) => messages.forEach(
        ([content, buffers]) => fire("msg:custom", content, buffers.map(bytes)));
    window.model = {
        get: (name) => traits[name],
        set: (name, value) => { traits[name] = value; fire(`change:${name}`); fire("change"); },
        save_changes: () => {},
        on: (name, handler) => handlers.set(name, [...(handlers.get(name) ?? []), handler]),
        send: async (content) => window.deliver(JSON.parse(await window.toKernel(JSON.stringify(content)))),
    };
    const { default: make } = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
    const widget = await make();
    widget.initialize({ model });
    widget.render({ model, el: document.getElementById("stage") });
}"""


class Stage:
    """A page that shows one widget.

    Args:
        browser: Whose page it is.
        widget: The widget; its client publishes when the test says so.
        width: Of the window.
    """

    def __init__(self, browser: Browser, widget: LiveWidget, width: int = 1200) -> None:
        self.wire = Wire(widget)
        self.page: Page = browser.new_page(viewport={"width": width, "height": HEIGHT})
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        self.page.on("console", self._on_console)
        self.page.expose_function("toKernel", self._take)
        self.page.set_content(PAGE)
        self.show_in("light")
        traits = {
            name: getattr(widget, name)
            for name, trait in widget.traits(sync=True).items()
            if not name.startswith("_") and name not in ("layout", "comm", "tabbable", "tooltip")
        }
        self.page.evaluate(MOUNT, [str(widget._esm), str(widget._css), traits])

    def show_in(self, theme: str) -> None:
        """Change to JupyterLab's light or dark theme."""
        sheet = (THEMES / f"theme-{theme}-extension" / "index.css").read_text()
        self.page.evaluate(
            "([sheet, light]) => { document.getElementById('theme').textContent = sheet;"
            "  document.body.dataset.jpThemeLight = light; }",
            [sheet, str(theme == "light").lower()],
        )

    def widen_to(self, width: int) -> None:
        self.page.set_viewport_size({"width": width, "height": HEIGHT})
        self.page.evaluate(DRAWN)  # what observes its own size has acted on it

    def flush(self) -> None:
        """Send the page what is new, until there is no more."""
        while messages := self._packed():
            self.page.evaluate("messages => window.deliver(messages)", messages)

    @property
    def panel(self) -> Locator:
        return self.page.locator(".tsnb-panel").first

    def clipped(self) -> list[str]:
        """Return what does not fit: texts that are cut off, and whatever makes the page wider than its window."""
        found: list[str] = self.page.evaluate(CLIPPED)
        return found

    def close(self) -> None:
        self.page.close()
        self.wire.widget.close()
        assert not self.problems, "\n".join(self.problems)

    def _take(self, content: str) -> str:
        self.wire.page_says(**json.loads(content))
        return json.dumps([*self._packed(), *self._packed()])

    def _packed(self) -> list[Any]:
        self.wire.flush()
        return [
            [content, [base64.b64encode(bytes(one)).decode() for one in buffers]]
            for content, buffers in self.wire.sent
        ]

    def _on_console(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(f"console error: {message.text}")


DRAWN = (
    "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
)
CLIPPED = """() => {
    const panel = document.querySelector(".tsnb-panel").getBoundingClientRect();
    const found = [];
    if (document.documentElement.scrollWidth > innerWidth) found.push("the page scrolls sideways");
    for (const area of document.querySelectorAll(".tsnb-checkpoints, .tsnb-lists"))
        if (area.scrollWidth > area.clientWidth + 1) found.push(`scrolls sideways: ${area.className}`);
    for (const node of document.querySelectorAll(".tsnb-panel *")) {
        const box = node.getBoundingClientRect();
        if (!box.width || !box.height || node.closest(".tsnb-voice, svg, [hidden]")) continue;
        const what = `${node.tagName.toLowerCase()}.${node.className}: ${node.textContent.slice(0, 40)}`;
        const outside = box.left < panel.left - 1 || box.right > panel.right + 1;
        if (outside && !node.closest(".tsnb-scroll")) found.push(`outside: ${what}`);
        const style = getComputedStyle(node);
        const cuts = !["visible", "auto"].includes(style.overflowX) && style.textOverflow !== "ellipsis";
        const control = ["INPUT", "SELECT"].includes(node.tagName);
        if (cuts && !control && node.scrollWidth > node.clientWidth + 1) found.push(`cut: ${what}`);
    }
    return found;
}"""
