"""What the panel looks like and who can use it: every state in both themes and three widths, with axe-core beside."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, expect

from .lab import SCREENSHOTS
from .scenes import SCENES
from .stage import Stage

WIDTHS = (1200, 900, 600)
FAST = ("running", "reward")  # the rest is in soak
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.soak) for name in SCENES]


@pytest.fixture
def stage(browser: Browser, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    stage = Stage(browser, SCENES[request.param](tmp_path / "client"))
    stage.flush()
    yield stage
    stage.close()


def violations(stage: Stage) -> list[str]:
    """Return what axe-core finds wrong with the panel."""
    found = Axe().run(stage.page, context=".tsnb-panel").response["violations"]
    return [f"{one['id']}: {node['html'][:160]}" for one in found for node in one["nodes"]]


def screenshot(stage: Stage, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    stage.panel.screenshot(path=SCREENSHOTS / f"{name}.png")


@pytest.mark.parametrize("stage", NAMES, indirect=True)
def test_a_state_can_be_read_by_everybody_and_fits_into_every_width(
    stage: Stage, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["stage"]
    for theme in ("light", "dark"):
        stage.show_in(theme)
        assert violations(stage) == []
        for width in WIDTHS:
            stage.widen_to(width)
            assert stage.clipped() == []
            save = stage.panel.get_by_role("button", name="Download CSV", exact=True).first
            if save.is_visible():  # one line: no taller than the button beside it
                assert save.evaluate(
                    "one => one.getClientRects()[0].height < 2 * parseFloat(getComputedStyle(one).fontSize) + 12"
                )
            screenshot(stage, f"state-{name}-{theme}-{width}")


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["running", "private", "reward", "finished"], indirect=True)
def test_table_view_and_open_menus_can_be_read_by_everybody_and_fit_too(stage: Stage) -> None:
    for theme in ("light", "dark"):
        stage.show_in(theme)
        for name in ("Table view", "Rollback ▾", "Branch ▾"):
            button = stage.panel.get_by_role("button", name=name, exact=True)
            if name != "Table view" and not button.is_visible():
                continue  # no checkpoint yet
            button.click()
            assert violations(stage) == []
            for width in WIDTHS[::-1]:
                stage.widen_to(width)
                assert stage.clipped() == []
            stage.page.keyboard.press("Escape")
        stage.panel.get_by_role("button", name="Chart view", exact=True).click()


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["reward-finished"], indirect=True)
def test_a_chosen_point_brings_its_samples_into_view_and_escape_leads_back(stage: Stage) -> None:
    stage.page.set_viewport_size({"width": 1200, "height": 500})
    plot, samples = stage.panel.locator(".tsnb-plot").first, stage.panel.locator(".tsnb-samples")
    expect(samples).not_to_be_in_viewport(ratio=0.5)
    plot.focus()
    for key in ("End", "ArrowLeft", "Enter"):
        stage.page.keyboard.press(key)
    expect(samples.locator(".tsnb-title")).to_be_focused()
    expect(samples.locator(".tsnb-title")).to_have_text("samples of step 59")
    expect(samples.locator(".tsnb-title")).to_be_in_viewport()
    expect(samples.locator("[aria-live=polite]").first).to_contain_text("5 prompts, 2 with signal")
    prompts = samples.locator(".tsnb-prompt q")
    expect(prompts.first).to_have_text("17+25=")
    stage.page.keyboard.press("Escape")
    expect(plot).to_be_focused()


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["reward-finished"], indirect=True)
def test_answers_are_one_stop_for_the_tab_key_and_arrows_go_on_from_there(stage: Stage) -> None:
    answers = stage.panel.locator(".tsnb-answer")
    assert stage.panel.locator(".tsnb-answer[tabindex='0']").count() == 1
    answers.first.focus()
    stage.page.keyboard.press("ArrowDown")
    expect(answers.nth(1)).to_be_focused()
    stage.page.keyboard.press("ArrowRight")
    expect(stage.panel.locator(".tsnb-token")).to_contain_text("token 2 of 2 “2” advantage −0.50")
    assert stage.panel.locator(".tsnb-answer[tabindex='0']").count() == 1


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["conversations"], indirect=True)
def test_a_rollout_of_several_turns_is_a_conversation_that_arrows_go_through(stage: Stage) -> None:
    samples = stage.panel.locator(".tsnb-samples")
    talk = samples.locator(".tsnb-talk").first
    expect(samples).to_contain_text("shaded: said by the environment, not trained")
    expect(talk.locator("li")).to_have_count(3)
    expect(talk.locator(".tsnb-told")).to_have_text("42")
    expect(talk.locator("li").nth(1)).to_contain_text("tool calculator")
    expect(talk).to_contain_text("called calculator(expression='17 + 25')")
    expect(talk).to_contain_text("reward +0.20")
    failed = samples.locator(".tsnb-failed").first
    expect(failed).to_have_text("failed calculator(expression='?')")
    assert samples.locator(".tsnb-told b, .tsnb-told script").count() == 0  # markup of a tool is text
    answers = samples.locator(".tsnb-answer")
    answers.first.focus()
    stage.page.keyboard.press("ArrowDown")  # from turn to turn, past what the environment said
    expect(answers.nth(1)).to_be_focused()
    expect(answers.nth(1)).to_have_attribute("aria-label", "turn 2, advantage +0.50")
    stage.page.keyboard.press("ArrowRight")
    expect(samples.locator(".tsnb-token")).to_contain_text("token 2 of 2 “2” advantage +0.50")
    samples.get_by_role("button", name="Compare").click()
    samples.locator("select:visible").first.select_option("59")
    expect(samples.locator(".tsnb-versus .tsnb-talk").first).to_be_visible()
    assert stage.clipped() == []


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["reward-finished"], indirect=True)
def test_the_same_held_out_prompts_are_compared_across_steps(stage: Stage) -> None:
    samples = stage.panel.locator(".tsnb-samples")
    samples.get_by_role("button", name="Compare").click()
    expect(samples.locator(".tsnb-title")).to_have_text("held-out prompts")
    expect(samples.locator(".tsnb-prompt q")).to_have_count(4)
    cards = samples.locator(".tsnb-card")
    expect(cards.first.locator(".tsnb-prompt")).to_contain_text("17+25=")
    expect(cards.first.locator(".tsnb-prompt")).to_contain_text("reward 0 → 1 (+1.00)")  # from step 20 to 40
    expect(cards.nth(2).locator(".tsnb-prompt")).to_contain_text("reward 0 → 0")
    expect(samples.get_by_label("step", exact=True)).to_have_value("20")
    samples.get_by_label("compared with step").select_option("60")
    expect(cards.nth(2).locator(".tsnb-prompt")).to_contain_text("reward 0 → 1 (+1.00)")
    for theme in ("light", "dark"):
        stage.show_in(theme)
        assert violations(stage) == []
        for width in WIDTHS:
            stage.widen_to(width)
            assert stage.clipped() == []
            screenshot(stage, f"held-out-{theme}-{width}")
    samples.get_by_role("button", name="Compare").click()
    expect(samples.locator(".tsnb-title")).to_have_text("samples of step 59")


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["compared"], indirect=True)
def test_the_legend_says_what_is_drawn_and_hides_a_line(stage: Stage) -> None:
    entries = stage.panel.locator(".tsnb-entry")
    expect(entries).to_have_count(6)
    dashes = [entry.locator("line").get_attribute("stroke-dasharray") for entry in entries.all()]
    assert dashes == ["", "7 3", "2 2", "9 3 2 3", "4 4", "12 4"]
    colours = entries.locator("svg").evaluate_all("all => all.map(one => one.style.color)")
    assert colours == [f"var(--tsnb-c{number})" for number in range(6)]
    before = painted(stage.panel)
    entries.nth(1).focus()
    stage.page.keyboard.press("Enter")
    expect(entries.nth(1)).to_have_attribute("aria-pressed", "false")
    stage.page.wait_for_function(
        "before => document.querySelector('canvas').toDataURL() !== before", arg=before
    )
    expect(entries.nth(1)).to_be_focused()
    stage.page.keyboard.press("Enter")
    stage.page.wait_for_function(
        "before => document.querySelector('canvas').toDataURL() === before", arg=before
    )


DARKEST = """canvas => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let least = 255;
    for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 200) least = Math.min(least, data[i + 1]);
    return least;
}"""


def painted(panel: Locator) -> str:
    return str(panel.locator("canvas").first.evaluate("canvas => canvas.toDataURL()"))


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["reward"], indirect=True)
def test_with_forced_colours_every_part_is_drawn_in_the_colours_of_the_system(stage: Stage) -> None:
    for scheme in ("dark", "light"):
        stage.page.emulate_media(forced_colors="active", color_scheme=scheme, reduced_motion="reduce")
        names = ("--tsnb-text", "--tsnb-quiet", "--tsnb-c0", "--tsnb-c1")
        for name in names:
            colour = stage.panel.evaluate(
                "(panel, name) => getComputedStyle(panel).getPropertyValue(name)", name
            )
            assert colour in ("CanvasText", "LinkText")
        assert violations(stage) == []
        dark = stage.panel.locator("canvas").first.evaluate(DARKEST)
        assert dark < 60 if scheme == "light" else dark > 60, "curves are drawn in the colours of this scheme"
        screenshot(stage, f"forced-{scheme}")
    moving = stage.panel.locator(".tsnb-sign").evaluate("sign => getComputedStyle(sign).animationName")
    assert moving == "none"


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["running"], indirect=True)
def test_everything_that_can_be_used_is_reached_by_the_tab_key_and_shows_it(stage: Stage) -> None:
    wanted = stage.panel.locator(
        "button:visible, select:visible, input:visible, summary:visible, [tabindex='0']:visible"
    )
    stage.page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(wanted.count()):
        stage.page.keyboard.press("Tab")
        reached.append(
            stage.page.evaluate(
                "() => { const node = document.activeElement, style = getComputedStyle(node);"
                "  return [Boolean(node.closest('.tsnb-panel')), style.outlineStyle !== 'none']; }"
            )
        )
    assert reached == [[True, True]] * wanted.count()
    assert len(reached) > 12


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["running"], indirect=True)
def test_what_is_read_aloud_does_not_change_with_every_step(stage: Stage) -> None:
    stage.page.evaluate(
        "() => { window.said = 0; const all = { childList: true, characterData: true, subtree: true };"
        "  for (const node of document.querySelectorAll('[aria-live=polite], [role=status], [role=alert]'))"
        "    new MutationObserver(() => { window.said += 1; }).observe(node, all); }"
    )
    client = stage.wire.widget.scene.client
    for _ in range(30):
        client.measure(loss=1.0)
        stage.flush()
    expect(stage.panel).to_have_attribute("data-points", "90")
    assert stage.page.evaluate("window.said") == 0
