"""The tools that come along: arithmetic that runs no code, and Python in a process of its own."""

import pytest

from tensafe_nb.rlvr.tools import Tool, ToolError, calculator, python


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 + 34", "46"),
        ("(2 + 3) * 4 =", "20"),
        ("7 / 2", "3.5"),
        ("6 / 2", "3"),
        ("1 / 3", "0.333333333333"),
        ("2 ^ 10", "1024"),
        ("3 × 4 ÷ 2 − 1", "5"),
        ("-7 // 2 + 7 % 4", "-1"),
        ("sqrt(16) + max(1, 2, abs(-3))", "7"),
        ("2 * pi", "6.28318530718"),
        ("10**20", "100000000000000000000"),
    ],
)
def test_the_calculator_works_out_what_models_write(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "().__class__",
        "'a' * 3",
        "True + 1",
        "[1] * 9",
        "9 ** 9 ** 9",
        "factorial(9)",
        "1e308 * 10",
        "(-8) ** 0.5",
        "1 / 0",
        "",
        "1 +",
        "(" * 400,
        "lambda: 1",
        "x",
        "1" * 501,
        "round(1, ndigits=2)",
        "sqrt()",
        "log(0)",
    ],
)
def test_what_is_no_arithmetic_is_an_error_for_the_model_and_nothing_is_run(expression: str) -> None:
    with pytest.raises(ToolError, match="calculator raised"):
        Tool.of(calculator).call({"expression": expression}, None)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("1 + 1", "2"),
        ("for i in range(3):\n    print(i)", "0\n1\n2"),
        ("```python\nprint('fenced')\n```", "fenced"),
        ("x = 1", "(it printed nothing)"),
        ("x = (", "SyntaxError: '(' was never closed (line 1)"),
        ("def f():\n    return 1 / 0\nf()", "ZeroDivisionError: division by zero (line 2)"),
        ("import sys; print('before'); sys.exit(3)", "before\nSystemExit: 3 (line 1)"),
        ("import os\nprint(sorted(os.listdir()), 'TENSAFE_HOME' in os.environ)", "[] False"),
    ],
)
def test_python_says_what_the_code_says_and_how_it_failed(code: str, said: str) -> None:
    assert Tool.of(python).call({"code": code}, None) == said


def test_python_that_ends_its_process_is_an_error_for_the_model() -> None:
    with pytest.raises(ToolError, match="python raised TimeoutError"):
        Tool.of(python).call({"code": "import os; os._exit(0)"}, None)
