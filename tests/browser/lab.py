"""Drives a real JupyterLab in a real Chromium: through the app's command registry, never through the keyboard."""

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
SCREENS = SCREENSHOTS.with_name("screens")
WIDTH, HEIGHT, TALL = 1180, 860, 2400
PATIENCE = 60_000  # ms


class Server:
    """The JupyterLab server under test."""

    def __init__(self, url: str, token: str, root: Path) -> None:
        self.url, self.token, self.root = url, token, root

    def api(self, path: str, method: str = "GET") -> Any:
        request = Request(
            f"{self.url}/api/{path}", method=method, headers={"Authorization": f"token {self.token}"}
        )
        with urlopen(request, timeout=10) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    @property
    def data_folder(self) -> Path:
        """Where its kernelspecs are."""
        return self.root.parent / "data"

    def write_notebook(self, name: str, cells: Sequence[str], kernel: str = "python3") -> None:
        blank: dict[str, Any] = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
        notebook = {
            "cells": [blank | {"id": f"c{number}", "source": source} for number, source in enumerate(cells)],
            "metadata": {"kernelspec": {"display_name": kernel, "language": "python", "name": kernel}},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        (self.root / name).write_text(json.dumps(notebook))

    def forget_theme(self) -> None:
        """JupyterLab keeps the theme that a scenario chose; the next one begins with the default."""
        settings = self.root.parent / "settings" / "@jupyterlab" / "apputils-extension"
        (settings / "themes.jupyterlab-settings").unlink(missing_ok=True)

    def end_kernels(self) -> None:
        for session in self.api("sessions"):
            self.api(f"sessions/{session['id']}", "DELETE")


class Lab:
    """One notebook, open in one page; notes every error and every request."""

    def __init__(self, page: Page, server: Server, name: str) -> None:
        self.page, self.server, self.name = page, server, name
        self.problems: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        page.on("console", self._on_console)
        page.on("request", lambda request: self._on_request(request.url))

    def open(self) -> None:
        """Open the notebook and wait until its kernel is idle."""
        self.page.goto(f"{self.server.url}/lab/tree/{self.name}?token={self.server.token}&reset")
        self.wait_for_kernel()

    def reload(self) -> None:
        """Load the page anew, as the key F5 does; what was not saved is gone from the page."""
        self.page.goto(f"{self.server.url}/lab/tree/{self.name}?token={self.server.token}")
        self.wait_for_kernel()

    def save(self) -> None:
        self.page.evaluate("jupyterapp.commands.execute('docmanager:save')")

    def run_cell(self, index: int) -> None:
        """Start a cell; the promise of the command resolves only when the cell ends, so it is not awaited."""
        self.page.evaluate(
            "i => { const nb = jupyterapp.shell.currentWidget.content; nb.activeCellIndex = i;"
            "       void jupyterapp.commands.execute('notebook:run-cell'); }",
            index,
        )

    def finish_cell(self, index: int) -> None:
        """Run a cell and wait until it has returned."""
        self.run_cell(index)
        expect(self.page.locator(".jp-Cell").nth(index).locator(".jp-InputPrompt")).to_have_text(
            re.compile(r"\[\d+\]"), timeout=PATIENCE
        )

    def switch_theme(self, theme: str) -> None:
        self.page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', { theme })", theme)
        light = "true" if theme.endswith("Light") else "false"
        self.page.wait_for_selector(f"body[data-jp-theme-light='{light}']", state="attached")

    def output(self, index: int) -> Locator:
        return self.page.locator(".jp-Cell").nth(index).locator(".jp-OutputArea").first

    @property
    def panel(self) -> Locator:
        return self.page.locator(".tsnb-panel").first

    @property
    def chart(self) -> Locator:
        """The large chart of the panel."""
        return self.panel.locator(".tsnb-plot").first

    def press(self, name: str) -> None:
        """Click a button of the panel, wherever it is."""
        self.panel.get_by_role("button", name=name, exact=True).first.click()

    def value(self, name: str) -> str:
        return self.panel.get_attribute(f"data-{name}") or ""

    def wait_until(self, condition: str, *, timeout: float = PATIENCE) -> float:
        """Wait for a JavaScript condition on the panel's `data` (numbers as numbers); return the seconds it took."""
        started = time.perf_counter()
        self.page.wait_for_function(
            "condition => { const panel = document.querySelector('.tsnb-panel'); if (!panel) return false;"
            "  const data = Object.fromEntries(Object.entries(panel.dataset).map(([k, v]) =>"
            "    [k, v !== '' && !isNaN(v) ? Number(v) : v]));"
            "  return new Function('data', `return (${condition})`)(data); }",
            arg=condition,
            timeout=timeout,
            polling=20,
        )
        return time.perf_counter() - started

    def samples(self, name: str, count: int) -> list[float]:
        """Return the next values that an attribute of the panel takes."""
        return [
            float(value)
            for value in self.panel.evaluate(
                """(panel, [name, count]) => new Promise(resolve => {
                const values = [];
                const watcher = new MutationObserver(() => {
                    values.push(panel.dataset[name]);
                    if (values.length === count) { watcher.disconnect(); resolve(values); }
                });
                watcher.observe(panel, { attributeFilter: [`data-${name}`] });
            })""",
                [name, count],
            )
        ]

    def screen(self, name: str, *, of: Locator) -> Path:
        """Take a picture of a state, which `make screens` leaves to be looked at."""
        return self.screenshot(name, of=of, into=SCREENS)

    def screenshot(self, name: str, *, of: Locator | None = None, into: Path = SCREENSHOTS) -> Path:
        into.mkdir(parents=True, exist_ok=True)
        path = into / f"{name}.png"
        if of is None:
            self.page.screenshot(path=path)
            return path
        self.page.set_viewport_size({"width": WIDTH, "height": TALL})
        of.scroll_into_view_if_needed()
        of.screenshot(path=path)
        self.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        return path

    def check(self) -> None:
        """Fail if the page had an error, or asked anybody but the server for anything."""
        assert not self.problems, "\n".join(self.problems)

    def wait_for_kernel(self) -> None:
        """Wait until the notebook's kernel is idle."""
        self.page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.context?.sessionContext?.session?.kernel?.status === 'idle'"
        )

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.problems.append(f"console error: {message.text} ({message.location.get('url')})")

    def _on_request(self, url: str) -> None:
        host = urlsplit(url)
        if host.scheme in ("http", "https", "ws", "wss") and host.netloc != urlsplit(self.server.url).netloc:
            self.problems.append(f"request outside the server: {url}")


@contextmanager
def opened(
    browser: Browser,
    server: Server,
    name: str,
    cells: Sequence[str],
    scale: float = 1,
    kernel: str = "python3",
) -> Iterator[Lab]:
    """Open a fresh notebook in a fresh page; afterwards check for problems and end its kernel."""
    server.write_notebook(f"{name}.ipynb", cells, kernel)
    server.forget_theme()
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=scale)
    lab = Lab(context.new_page(), server, f"{name}.ipynb")
    try:
        lab.open()
        yield lab
        lab.check()
    finally:
        context.close()
        server.end_kernels()
