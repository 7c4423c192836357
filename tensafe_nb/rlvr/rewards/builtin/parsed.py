"""Built-in rewards that read a response as something else than text: JSON, an arithmetic expression."""

import ast
import json
import re
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.rewards.builtin.answers import Builtin, Meta, column_of, fenced
from tensafe_nb.rlvr.rewards.builtin.numerals import final_answer, gold_number


def json_schema(
    prompt: str,
    response: str,
    meta: Meta = None,
    *,
    schema: Mapping[str, Any] | None = None,
    column: str = "schema",
    partial: float = 0.0,
) -> float:
    """Reward 1 for JSON that satisfies a JSON Schema, `partial` for other JSON, 0 for what is no JSON.

    Args:
        prompt: Not read.
        response: JSON, alone or in a fenced block.
        meta: Holds the schema when none is bound.
        schema: For all prompts (json-schema.org).
        column: Under this name.
        partial: For JSON that does not satisfy the schema.

    Raises:
        ValidationError: There is no schema.
    """
    import jsonschema  # type: ignore[import-untyped, unused-ignore]

    wanted = schema_of(meta, column) if schema is None else schema
    block = fenced(response, "json")
    try:
        value = json.loads(response if block is None else block, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0 if jsonschema.validators.validator_for(wanted)(wanted).is_valid(value) else partial


def refuse_constant(constant: str) -> None:
    """Refuse NaN and Infinity, which Python's reader would take."""
    raise ValueError(f"{constant} is Python's, not JSON's")


def schema_of(meta: Meta, column: str) -> Any:
    """Return a prompt's own schema: a mapping, or the JSON text of one."""
    given = column_of(meta, column, "json_schema")
    try:
        schema = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise ValidationError(
            f"json_schema: the column {as_given(column)} of this prompt is no JSON ({error})."
        ) from error
    check_json_schema(schema=schema)
    return schema


def check_json_schema(*, schema: Mapping[str, Any] | None = None, **_: Any) -> None:
    if schema is None:
        return
    import jsonschema

    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValidationError(f"json_schema: this is no JSON Schema ({error.message}).") from error
    except (AttributeError, TypeError) as error:
        raise ValidationError(f"json_schema: {str(schema)[:80]!r} is no JSON Schema.") from error


MAX_EXPRESSION = 200  # characters; a longer countdown is no answer
_SIGNS = {"×": "*", "÷": "/", "−": "-", "\\times": "*", "\\cdot": "*", "\\div": "/", "$": ""}


def countdown(
    prompt: str,
    response: str,
    meta: Meta = None,
    *,
    numbers: str = "numbers",
    target: str = "target",
    use_all: bool = True,
    partial: float = 0.0,
) -> float:
    r"""Reward 1 for an expression of +, -, *, / and brackets that makes the target of the numbers.

    The expression is what stands in the last \boxed{…}, else in the last <answer>…</answer>, else on the last line;
    "= 24" at its end is left off, and "1,000" is 1000. It is parsed with `ast` and computed in exact fractions; nothing
    is evaluated. The task is that of TinyZero.

    Args:
        prompt: Not read.
        response: Holds the expression.
        meta: Holds numbers and target.
        numbers: Column of the numbers, each to be used at most once.
        target: Column of the target.
        use_all: Each number must be used.
        partial: For a well-formed expression of the right numbers with another value.

    Raises:
        ValidationError: The prompt has no such columns.
    """
    what = "countdown: the column {!r} of this prompt"
    given = column_of(meta, numbers, "countdown")
    if isinstance(given, str | Mapping) or not hasattr(given, "__iter__"):
        raise ValidationError(f"{what.format(numbers)} holds {as_given(given)}, expected a list of numbers.")
    allowed = Counter(gold_number(number, what.format(numbers)).value for number in given)
    aim = gold_number(column_of(meta, target, "countdown"), what.format(target)).value
    read = expression_in(response)
    if read is None:
        return 0.0
    value, used = read
    if used - allowed or (use_all and used != allowed):
        return 0.0
    return 1.0 if value == aim else partial


def expression_in(response: str) -> tuple[Fraction | None, Counter[Fraction]] | None:
    """Return the value (None of a division by zero) and the numbers of the response's expression."""
    lines = final_answer(response)[0].strip().splitlines()
    text = lines[-1].split("=")[0] if lines else ""
    for sign, by in _SIGNS.items():
        text = text.replace(sign, by)
    text = text.strip()
    if not text or len(text) > MAX_EXPRESSION:
        return None
    used: Counter[Fraction] = Counter()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    try:
        return value_of(ast.parse(text, mode="eval").body, used), used
    except ZeroDivisionError:
        return None, used
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def value_of(node: ast.expr, used: Counter[Fraction]) -> Fraction:
    """Compute an expression exactly, and count the numbers it uses.

    Raises:
        ValueError: There is something else in it.
        ZeroDivisionError: It divides by 0.
    """
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            used[Fraction(repr(number))] += 1
            return Fraction(repr(number))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return value_of(left, used) + value_of(right, used)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return value_of(left, used) - value_of(right, used)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return value_of(left, used) * value_of(right, used)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return value_of(left, used) / value_of(right, used)
    raise ValueError("neither a number nor one of + - * /")


BUILTINS = {
    "json_schema": Builtin(json_schema, check_json_schema, inline=False),
    "countdown": Builtin(countdown),
}
