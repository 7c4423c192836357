"""The one reader of numbers: what people write, what stays ambiguous, and what is no number."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr import resolve_reward
from tensafe_nb.rlvr.rewards.builtin.numerals import final_number, gold_number, lone_number, numbers_in


def value_of(text, decimal="."):
    number = final_number(text, decimal)
    return None if number is None else number.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (".25", "1/4"), ("it is -.25.", "-1/4"), ("$.05", "1/20"), ("12.", 12), ("(+8)", 8), ("−3", -3), ("–3", -3),
        ("12,345,678", 12345678), ("12{,}500", 12500), ("12,\\!500", 12500), ("12\\,500", 12500), ("1_000_000", 10**6),
        ("12\u202f500", 12500), ("-$1,050.75", "-4203/4"), ("€20", 20), ("\\$20", 20),
        ("5/8", "5/8"), ("-5/8", "-5/8"), ("\\frac{5}{8}", "5/8"), ("-\\tfrac58", "-5/8"), ("\\frac{-5}{8}", "-5/8"),
        ("x=\\dfrac{ -5}{8}", "-5/8"),
        ("¾", "3/4"), ("5\\times10^{-2}", "1/20"), ("5\\cdot10^3", 5000), ("4 m$^2$", 4), ("\\left(8\\right)", 8),
        ("3 1/4", "13/4"), ("3\\frac{1}{4}", "13/4"), ("-3½", "-7/2"), ("2e-3", "1/500"), ("5×10^3", 5000),
        ("5 \\cdot 10^{-2}", "1/20"), ("3^4", 81), ("10^{6}", 10**6), ("y = 9.", 9), ("90^\\circ", 90),
        ("4 m^2", 4), ("a_2 = 6 and a_3", 6), ("on 3/4/2025", 2025), ("15 3/2", "3/2"), ("6-9", 9),
        ("**17**", 17), ("7 **19**", 19), ("٣", 3), ("version 1.2.3", 3),
    ],
)  # fmt: skip
def test_a_number_is_read_as_people_write_it(text, value):
    assert value_of(text) == Fraction(value)


@pytest.mark.parametrize("text", ["", "none", "8/0", "0^-1", "9" * 5000, "2^999999", "1e99999", "x^2", "."])
def test_what_has_no_value_is_no_number(text):
    assert value_of(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 + 4 = 7, so \\boxed{7}. I checked 2 times.", 7),
        ("\\boxed{1} no, \\boxed{\\frac{2}{3}} of 9", "2/3"),
        ("<think>1</think><answer>the result is 5</answer> 8", 5),
        ("two and two\n#### 4\nchecked 3 times", 4),
        ("#### $1,200.\n9 lines", 1200),
        ("#### Step 1\nthen 40 + 2\n#### 2. Result\nIt is 42", 42),  # headings of markdown, no answers
        ("\\boxed{12", 12),
        ("\\boxed 5", 5),
        ("\\boxed{6}, as asked for in \\boxed{}", 6),
        ("in <answer></answer> I say 6", 6),
    ],
)
def test_a_marked_answer_goes_before_the_last_number(text, value):
    assert value_of(text) == Fraction(value)


def test_a_marked_answer_that_is_an_expression_or_no_number_is_none():
    assert value_of("3 or \\boxed{2\\sqrt{3}}") is None
    assert value_of("3 or \\boxed{\\sqrt2}") is None
    assert value_of("3 or \\boxed{\\text{no solution}}") is None
    assert lone_number("(1, 2)", whole=True) is None
    assert lone_number("the sum is 3 + 4") is None
    assert lone_number("so it is 4.").value == 4
    assert [lone_number(text).value for text in ("*4*", "_4_", "**4**", "`4`")] == [4] * 4
    assert lone_number("3*4*") is None


def test_the_comma_parts_a_list_unless_three_digits_follow_or_it_is_the_decimal_sign():
    assert [n.value for n in numbers_in("3,14")] == [3, 14]
    assert value_of("3,14", decimal=",") == Fraction("3.14")
    assert value_of("1.234,5", decimal=",") == Fraction("1234.5")


@pytest.mark.parametrize(
    ("gold", "value"),
    [(7, 7), (0.1, "1/10"), (Decimal("2.50"), "5/2"), (Fraction(1, 3), "1/3"), (np.float32(0.5), "1/2"),
     (np.int64(9), 9), ("She has 8.\n#### 8", 8), (np.array(4.0), 4)],
)  # fmt: skip
def test_a_right_answer_may_be_a_number_or_a_text_that_gives_one(gold, value):
    assert gold_number(gold, "here").value == Fraction(value)


@pytest.mark.parametrize(
    ("gold", "match"),
    [("3,14", "two ways"), ("1.234,50", "two ways"), ("1.2.3", "two ways"), ("3, 4", "several"), ("12:30", "several"),
     ("two", "no number"),
     ("2\\sqrt{3}", "expression"), (True, "no number"), (math.inf, "no number"), ([1, 2], "no number")],
)  # fmt: skip
def test_a_right_answer_that_is_not_one_number_beyond_doubt_is_refused(gold, match):
    with pytest.raises(ValidationError, match=match):
        gold_number(gold, "here")


@pytest.mark.parametrize(
    ("gold", "response", "score"),
    [("50%", "0.5", 1), ("50", "50 %", 1), ("0.5", "50%", 1), ("50%", "50", 1), ("50%", "0.5%", 0), ("50%", "5", 0)],
)  # fmt: skip
def test_a_percent_sign_is_a_unit_or_a_factor(gold, response, score):
    assert resolve_reward("numeric_match")("q", response, {"answer": gold}) == score


def test_numbers_beyond_what_a_float_holds_are_compared_all_the_same():
    reward = resolve_reward("numeric_match", rel_tol=0, abs_tol=0)
    big = str(10**320 + 1)
    assert reward("q", f"it is {big}", {"answer": big}) == 1
    assert reward("q", f"it is {10**320}", {"answer": big}) == 0


@given(st.integers(-(10**12), 10**12), st.integers(0, 4))
@settings(deadline=None)
def test_every_way_to_write_a_decimal_reads_as_the_same_number(digits, places):
    value = Fraction(digits, 10**places)
    plain = f"{digits / 10**places:.{places}f}" if abs(digits) < 10**9 else str(digits)
    value = Fraction(plain)
    grouped = f"{abs(int(plain.split('.')[0])):,}" + plain[len(plain.split(".")[0]) :]
    grouped = ("-" if plain.startswith("-") else "") + grouped
    for text in (
        plain,
        grouped,
        f"\\boxed{{{grouped}}}",
        f"#### {plain}",
        f"${grouped}$.",
        f"so x = {plain}.",
    ):
        assert value_of(text) == value


@given(st.text(alphabet="0123456789.,-/^{}\\fracboxed %$e×_ ½\n#*<>", max_size=80))
@settings(deadline=None)
def test_no_text_makes_the_reader_fail(text):
    for number in numbers_in(text):
        assert 0 <= number.start < number.end
    final_number(text)
    lone_number(text)


@pytest.mark.parametrize(
    "piece", ["1,", "1/", "1 ", "1.", "-", "\\frac{1", "{", "\\boxed{", "1,000", "####1\n", "1^", "½"]
)
def test_reading_takes_a_number_of_steps_that_grows_with_the_text_not_with_its_square(piece):
    import time

    def seconds(count):
        text = piece * count
        best = math.inf
        for _ in range(3):
            started = time.process_time()
            final_number(text)
            best = min(best, time.process_time() - started)
        return best

    assert seconds(16_000) < 100 * max(seconds(1000), 1e-4)  # 16 times as long; by its square, 256 times
