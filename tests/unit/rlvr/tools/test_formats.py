"""Calls as models write them: read, or told what is wrong with them; and which way a template has."""

import pytest

from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.tools import Tool
from tensafe_nb.rlvr.tools.desk import carried_out
from tensafe_nb.rlvr.tools.formats import FORMATS, ToolCall, format_named, format_of


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


TOOLS = {"add": Tool.of(add)}
CALL = ToolCall("add", {"a": 1, "b": 2})
JSON = '{"name": "add", "arguments": {"a": 1, "b": 2}}'


@pytest.mark.parametrize(
    ("name", "said", "calls"),
    [
        ("hermes", "The sum is 3.", []),
        ("hermes", f"I add.\n<tool_call>\n{JSON}\n</tool_call>", [CALL]),
        ("hermes", f"<tool_call>{JSON}</tool_call>\n<tool_call>{JSON}</tool_call>", [CALL, CALL]),
        ("hermes", f"<tool_call>[{JSON}, {JSON}]</tool_call>", [CALL, CALL]),
        ("hermes", f"<tool_call>{JSON}", [CALL]),  # ended by a stop string
        ("hermes", f"<think>maybe <tool_call>{JSON}</tool_call></think>3", []),
        ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}</tool_call>', [CALL]),
        ("hermes", '<tool_call>{"function": {"name": "add", "parameters": {"a": 1, "b": 2}}}</tool_call>', [CALL]),
        (
            "qwen_xml",
            "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n</tool_call>",
            [CALL],
        ),
        ("llama", '{"name": "add", "parameters": {"a": 1, "b": 2}}', [CALL]),
        ("llama", f"<|python_tag|>{JSON}; {JSON}<|eom_id|>", [CALL, CALL]),
        ("llama", '{"answer": 3}', []),
        ("llama", "3", []),
        ("mistral", f"[TOOL_CALLS] [{JSON}]</s>", [CALL]),
        ("mistral", f"[{JSON}]", [CALL]),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}[TOOL_CALLS]add{"a": 1, "b": 2}', [CALL, CALL]),
        ("mistral", "[1, 2]", []),
        ("plain", "so [add(1, b=2)] and [1]", [ToolCall("add", {"b": 2}, [1])]),
        ("plain", "[add(1, 2)", [ToolCall("add", {}, [1, 2])]),
        ("plain", "[add(1, 2", [ToolCall("add", {}, [1, 2])]),
        ("plain", 'as in [say("a ] and ) b")]', [ToolCall("say", {}, ["a ] and ) b"])]),
    ],
)  # fmt: skip
def test_calls_are_read_as_the_model_writes_them(name: str, said: str, calls: list[ToolCall]) -> None:
    assert FORMATS[name].calls(said) == calls


@pytest.mark.parametrize(
    ("name", "said", "told"),
    [
        ("hermes", '<tool_call>{"name": "add", "argum</tool_call>', "Error: the call is not valid JSON"),
        ("hermes", "<tool_call></tool_call>", "Error: the call is empty"),
        ("hermes", "<tool_call>[1]</tool_call>", "Error: the call has no name"),
        ("hermes", '<tool_call>{"name": "add", "arguments": 3}</tool_call>', "Error: the arguments are no JSON object"),
        ("hermes", '<tool_call>{"name": "ad", "arguments": {}}</tool_call>', "Error: there is no tool 'ad'."),
        ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "x"}}</tool_call>', "Error: add: the argument 'a'"),
        ("qwen_xml", "<tool_call>add 1 2</tool_call>", "Error: the call cannot be read: write it as <tool_call>"),
        ("llama", '{"name": "add", "parameters": {"a": 1', "Error: the call is not valid JSON"),
        ("mistral", "[TOOL_CALLS]add[ARGS]{1}", "Error: the call is not valid JSON"),
        ("plain", "[add(a, 2)]", "Error: the call cannot be read: its arguments must be numbers"),
        ("plain", "[add(1, 2, 3)]", "Error: add takes 2 arguments, not 3"),
        ("plain", "[add(__import__('os').getpid(), 2)]", "Error: the call cannot be read"),
    ],
)  # fmt: skip
def test_what_was_meant_to_be_a_call_and_is_none_is_told_as_an_error(name: str, said: str, told: str) -> None:
    (done,) = carried_out(FORMATS[name].calls(said), TOOLS, None)
    assert not done.ok and done.result.startswith(told)


@pytest.mark.parametrize(
    ("template", "name", "shown"),
    [
        (None, "plain", False),
        ("{{ messages }}", "hermes", False),
        ("{% if tools %}{% endif %}<tool_call>\n{\"name\": ", "hermes", True),
        ("{% for tool in tools %}{% endfor %}<tool_call>\n<function=x>\n<parameter=y>", "qwen_xml", True),
        ("{% if tools is not none %}{{ '\"parameters\": ' }}{% endif %}<|start_header_id|>ipython", "llama", True),
        ("[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS][TOOL_CALLS]", "mistral", True),
    ],
)  # fmt: skip
def test_the_template_decides(template: str | None, name: str, shown: bool) -> None:
    assert format_of(template) == (FORMATS[name], shown)


def test_a_template_with_calls_of_its_own_kind_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValidationError, match=r"like none of those known here.*format="):
        format_of("{% for tool in tools %}<|start|>functions.{{ tool }}")
    with pytest.raises(ValidationError, match=r"'hermse' is no way to write calls. Did you mean 'hermes'"):
        format_named("hermse")


def test_models_without_a_template_are_told_of_tools_in_a_few_words() -> None:
    said = FORMATS["plain"].described([TOOLS["add"]])
    assert said == "Tools you may call, in square brackets:\n[add(a: integer, b: integer)] Add two numbers."
    assert '{"name": "add", "description": "Add two numbers."' in FORMATS["hermes"].described([TOOLS["add"]])


def test_calls_of_a_turn_share_one_time_limit_and_there_is_an_end_to_them() -> None:
    def hang() -> None:
        while True:
            pass

    tools = TOOLS | {"hang": Tool.of(hang)}
    first, second, _ = carried_out([CALL, ToolCall("hang"), CALL], tools, 0.2)
    assert first.ok and first.result == "3"
    assert not second.ok and "took longer than" in second.result
    done = carried_out([CALL] * 40, TOOLS, None)
    assert [one.ok for one in done] == [True] * 16 + [False]
