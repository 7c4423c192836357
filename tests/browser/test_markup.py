"""Markup in whatever can hold a text: JupyterLab shows it as text, in a real browser."""

from ..markup import EVIL, SHOWN, WORLD
from .conftest import Open

FIRED = (
    "() => window.fired === undefined && !document.querySelector('[onerror], [onload], [onclick^=window]')"
)


def test_markup_in_every_field_is_shown_as_text(notebook: Open) -> None:
    with notebook([WORLD, *SHOWN]) as lab:
        for cell in range(1 + len(SHOWN)):
            lab.finish_cell(cell)
        lab.page.wait_for_selector(".tsnb-panel")
        lab.wait_until("data.state === 'FINISHED'")
        lab.page.evaluate(
            "() => document.querySelectorAll('.tsnb-panel details').forEach(one => { one.open = true; })"
        )
        answer = lab.page.locator(".tsnb-answer").first
        answer.focus()
        lab.page.keyboard.press("ArrowRight")
        shown = lab.page.locator(".jp-Notebook").inner_text()
        assert shown.count("<img src=x") > 20, "it is there to be seen, as text"
        lab.page.wait_for_function(FIRED, timeout=1_000)
        elements = lab.page.evaluate(
            "() => [...document.querySelectorAll('.jp-OutputArea img, .jp-OutputArea script, .jp-OutputArea iframe')]"
            "  .filter(node => !(node.getAttribute('src') || '').startsWith('data:image/png'))"
            "  .map(node => node.outerHTML.slice(0, 200))"
        )
        assert elements == []
        assert EVIL.startswith("<script>")
