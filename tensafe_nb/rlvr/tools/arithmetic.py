"""The calculator: arithmetic read as a tree and worked out node by node; nothing of it is run as code."""

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

MOST_TEXT, MOST_DIGITS = 500, 1_000
_OPERATIONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sqrt": math.sqrt,
    "abs": abs,
    "round": round,
    "min": min,
    "max": max,
    "floor": math.floor,
    "ceil": math.ceil,
    "log": math.log,
    "exp": math.exp,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}


def calculator(expression: str) -> str:
    """Work out an arithmetic expression.

    Args:
        expression: For example "(12 + 34) * 2".
    """
    if len(expression) > MOST_TEXT:
        raise ValueError(f"the expression is longer than {MOST_TEXT} characters")
    # what models write for these signs, thousands and a closing "="
    text = expression.strip().rstrip("=? ").replace("^", "**")
    for written, meant in (("×", "*"), ("·", "*"), ("÷", "/"), ("−", "-"), ("–", "-")):
        text = text.replace(written, meant)
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"{expression!r} is no arithmetic expression") from None
    value = evaluated(tree.body)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def evaluated(node: ast.AST) -> Any:
    """Return the value of a node of an expression.

    Raises:
        ValueError: It is something else than arithmetic, or too large.
    """
    match node:
        case ast.Constant(value=bool()):
            raise ValueError("only numbers can be worked with")
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](evaluated(operand))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return power(evaluated(left), evaluated(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return bounded(_OPERATIONS[type(op)](evaluated(left), evaluated(right)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return bounded(_FUNCTIONS[name](*map(evaluated, arguments)))
    raise ValueError(
        f"{ast.unparse(node)!r} is no arithmetic: only numbers, + - * / // % ^ and {', '.join(_FUNCTIONS)}"
    )


def power(base: Any, exponent: Any) -> Any:
    """Return a power, unless it has more digits than anybody would read."""
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1 and exponent > 0:
        digits = exponent * math.log10(abs(base))
        if digits > MOST_DIGITS:
            raise ValueError(f"the result has more than {MOST_DIGITS} digits")
    value = base**exponent
    if isinstance(value, complex):
        raise ValueError("the result is no real number")
    return bounded(value)


def bounded(value: Any) -> Any:
    """Return a number that can be written.

    Raises:
        ValueError: It is infinite, undefined, or has too many digits.
    """
    if isinstance(value, int) and value.bit_length() > MOST_DIGITS * math.log2(10):
        raise ValueError(f"the result has more than {MOST_DIGITS} digits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("the result is not finite")
    return value
