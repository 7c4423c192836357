"""A chat under its cell in a real JupyterLab: typed into, stopped, judged, loaded again, and seen by everybody."""

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from .conftest import Open
from .lab import SCREENSHOTS, Lab

SETUP = """\
import tensafe_nb as tn
service = tn.ServiceClient()
base = service.create_training_client(lora_config={"rank": 8})
tuned = service.create_training_client(lora_config={"rank": 8}, optimizer={"learning_rate": 3e-3})
await tuned.fit(tuned.batches(tn.datasets.docstring_pairs("train")[:256]), steps=24, show=False)"""
CHAT = "chat = tn.chat(base=base, tuned=tuned, max_new_tokens=48, seed=7)\nchat"
SAID = 'reply = await chat.say("abs(x, /)")\nprint(reply.texts["tuned"])'
MARKUP = "<img src=x onerror=\"document.title='broken'\"><b>bold</b>"
FIT = """\
run = tuned.fit([tn.BatchData([[3, 4, 5, 6] * 100] * 8)] * 50, steps=100_000, show=False)
while not run.steps_done:
    await asyncio.sleep(0.01)"""


def violations(lab: Lab) -> list[str]:
    """Return what axe-core finds wrong with the chat."""
    found = Axe().run(lab.page, context=".tsnb-chat").response["violations"]
    return [f"{one['id']}: {node['html'][:160]}" for one in found for node in one["nodes"]]


def seen(lab: Lab, name: str) -> None:
    """Take pictures, light and dark, wide and narrow."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for theme in ("Light", "Dark"):
        lab.switch_theme(f"JupyterLab {theme}")
        for width in (1180, 900):
            lab.page.set_viewport_size({"width": width, "height": 1000})
            lab.panel.scroll_into_view_if_needed()
            assert violations(lab) == []
            overflows = lab.panel.evaluate("one => one.scrollWidth > one.clientWidth + 1")
            assert not overflows, f"{name}: cut at {width}"
            lab.panel.screenshot(path=SCREENSHOTS / f"chat-{name}-{theme.lower()}-{width}.png")
    lab.page.set_viewport_size({"width": 1180, "height": 860})
    lab.switch_theme("JupyterLab Light")


@pytest.mark.soak
def test_a_chat_is_typed_into_judged_stopped_and_comes_back_after_a_reload(notebook: Open) -> None:
    with notebook([SETUP, CHAT, SAID, "chat", f"import asyncio\n{FIT}", "run.stop()"]) as lab:
        for cell in (0, 1):
            lab.finish_cell(cell)
        area = lab.panel.get_by_label("what you say")
        words = lab.panel.locator(".tsnb-said .tsnb-words")
        lab.wait_until("data.going === 'false'")
        lab.finish_cell(2)
        lab.wait_until("data.turns === 1 && data.going === 'false'")
        told = lab.output(2).inner_text().strip().splitlines()[-1].strip()
        assert told in words.nth(1).inner_text(), "said from a cell, seen in the panel"

        area.fill("len(obj, /)")
        area.press("Shift+Enter")
        assert area.input_value() == "len(obj, /)\n"
        area.press("Backspace")
        area.press("Enter")
        lab.wait_until("data.turns === 2 && data.going === 'false'")
        assert area.input_value() == ""
        for number, name in ((0, "bad answer"), (1, "good answer")):
            lab.panel.locator(".tsnb-said").nth(number).get_by_role("button", name=name).click()
        lab.wait_until("data.pairs === 1")
        lab.panel.locator(".tsnb-said").nth(2).get_by_role("button", name="Another").click()
        lab.wait_until("data.going === 'false' && data.acked === 4")
        expect(lab.panel.locator(".tsnb-said").nth(2)).to_contain_text("2/2")
        with lab.page.expect_download() as saved:
            lab.panel.get_by_role("button", name="Save rows").click()
        assert "abs(x, /)" in saved.value.path().read_text()
        seen(lab, "two")

        lab.panel.get_by_role("button", name="Log-probabilities").click()
        token = words.nth(1).locator("span").nth(3)
        token.hover()
        expect(lab.panel.locator(".tsnb-reading")).to_contain_text("log-probability")
        words.nth(1).focus()
        lab.page.keyboard.press("ArrowRight")
        lab.page.keyboard.press("ArrowRight")
        expect(words.nth(1).locator(".tsnb-at")).to_have_count(1)
        assert lab.panel.locator(".tsnb-reading").inner_text().startswith("“")
        seen(lab, "colours")

        lab.panel.locator(".tsnb-turn").nth(1).get_by_role("button", name="Edit").click()
        lab.panel.get_by_label("what you say instead").fill(MARKUP)
        lab.panel.get_by_label("what you say instead").press("Enter")
        lab.wait_until("data.turns === 2 && data.going === 'false'")
        expect(lab.panel.locator(".tsnb-mine").nth(1)).to_contain_text(MARKUP)
        assert lab.panel.locator("img, b b").count() == 0

        lab.panel.get_by_role("button", name="Settings").click()
        field = lab.panel.get_by_label("Max new tokens")
        field.fill("400")
        field.press("Tab")
        lab.panel.get_by_label("System prompt").fill("Answer in one line.")
        lab.panel.get_by_label("System prompt").press("Tab")
        seen(lab, "settings")
        lab.panel.get_by_role("button", name="Settings").click()

        lab.finish_cell(4)
        area.fill("hex(number)")
        area.press("Enter")
        lab.wait_until("data.going === 'true'")
        expect(lab.panel.get_by_text(re.compile("waits for its turn|tokens"))).not_to_have_count(0)
        lab.panel.get_by_role("button", name="Stop", exact=True).click()
        lab.wait_until("data.going === 'false' && data.turns === 3")
        lab.finish_cell(5)
        before = lab.panel.locator(".tsnb-log").inner_text()
        lab.panel.get_by_role("button", name="Log-probabilities").click()
        lab.save()
        lab.reload()
        lab.wait_until("data.turns === 3 && data.pairs === 1")
        assert "".join(before.split()).replace("↵", "") == "".join(
            lab.panel.locator(".tsnb-log").inner_text().split()
        )
        expect(lab.panel).to_contain_text("was loaded again")
        lab.finish_cell(3)
        assert lab.output(3).locator(".tsnb-chat").count() == 1
