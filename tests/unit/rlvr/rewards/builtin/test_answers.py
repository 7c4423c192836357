"""The built-in rewards: their figures, their verdicts, and what they refuse."""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr import get_registered_rewards, resolve_reward
from tensafe_nb.rlvr.rewards.builtin.answers import common_subsequence, edit_distance
from tensafe_nb.rlvr.rewards.builtin.code import folder_of_its_own, remove_left_behind

TEXTS = st.text("abc ", max_size=70)


def reward_of(name, response, meta=None, **kwargs):
    return resolve_reward(name, **kwargs)("question", response, meta)


SIMPLE = """keyword_contains exact_match contains numeric_match json_schema levenshtein lcs_ratio length_penalty
format_compliance repetition countdown python_code"""


def test_every_built_in_is_registered_and_documented():
    names = get_registered_rewards()
    assert {*SIMPLE.split(), "regex", "overlong", "composite", "math"} <= set(names)
    for name in SIMPLE.split():
        assert "Args:" in resolve_reward(name).function.__doc__


@pytest.mark.parametrize(
    ("response", "score"),
    [("42", 1.0), (" 42\n", 1.0), ("42.", 0.0), ("7 times 6.\n#### 42", 1.0), ("7 times 6.", 0.0), ("", 0.0)],
)
def test_exact_match_finds_the_answer_of_a_solution_as_gsm8k_writes_it(response, score):
    assert reward_of("exact_match", response, {"answer": "7 times 6.\n#### 42"}) == score
    heading = {"answer": "#### Title\nand text"}
    assert reward_of("exact_match", "and text", heading) == reward_of("exact_match", "Title", heading) == 0.0


def test_exact_match_can_ignore_case_and_read_another_column():
    assert reward_of("exact_match", "PARIS", {"gold": "Paris"}, column="gold", ignore_case=True) == 1.0
    assert reward_of("exact_match", "PARIS", {"gold": "Paris"}, column="gold") == 0.0


def test_a_missing_column_is_named_together_with_those_there_are():
    with pytest.raises(ValidationError, match=r"needs the column 'answer'.* It has: solution, level\."):
        reward_of("numeric_match", "1", {"solution": 1, "level": 2})


def test_contains_finds_the_answer_anywhere_and_refuses_an_empty_one():
    assert reward_of("contains", "It is paris.", {"answer": "Paris"}) == 1.0
    assert reward_of("contains", "It is paris.", {"answer": "Paris"}, ignore_case=False) == 0.0
    with pytest.raises(ValidationError, match="of this prompt is missing"):
        reward_of("contains", "text", {"answer": " "})


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("first 3, then 4", 4, 1.0),
        ("#### 1,234.50", "1234.5", 1.0),
        ("it costs $5.", "5", 1.0),
        ("-3", -3, 1.0),
        ("10-3", "3", 1.0),
        ("2e-3", "0.002", 1.0),
        ("−7", -7, 1.0),
        ("so 42", "step one 6*7 #### 42", 1.0),
        ("1,2", "2", 1.0),
        ("41", "42", 0.0),
        ("no number", "42", 0.0),
        ("", "0", 0.0),
    ],
)  # fmt: skip
def test_numeric_match_compares_last_numbers(response, answer, score):
    assert reward_of("numeric_match", response, {"answer": answer}) == score


def test_numeric_match_can_take_the_first_number_and_a_tolerance():
    assert reward_of("numeric_match", "3 apples of 5", {"answer": 3}, which="first") == 1.0
    assert reward_of("numeric_match", "3.1", {"answer": "3.14159"}, abs_tol=0.05) == 1.0
    with pytest.raises(ValidationError, match="holds no number"):
        reward_of("numeric_match", "3", {"answer": "three"})


def test_regex_searches_or_matches_the_whole_across_lines():
    assert reward_of("regex", "a\nb: 7", pattern=r"a.b: \d") == 1.0
    assert reward_of("regex", "say 7", pattern=r"\d") == 1.0
    assert reward_of("regex", "say 7", pattern=r"\d", full=True) == 0.0
    assert reward_of("regex", "YES", pattern="yes", ignore_case=True) == 1.0


def test_json_schema_tells_valid_from_other_json_from_none():
    schema = {"type": "object", "required": ["x"], "properties": {"x": {"type": "integer"}}}
    for response, score in [
        ('{"x": 3}', 1.0),
        ('```json\n{"x": 3}\n```', 1.0),
        ('{"x": "3"}', 0.25),
        ("x", 0.0),
    ]:
        assert reward_of("json_schema", response, schema=schema, partial=0.25) == score
    assert reward_of("json_schema", "[1]", {"schema": {"type": "array"}}) == 1.0
    assert reward_of("json_schema", "[" * 100_000, {"schema": {}}) == 0.0


def test_levenshtein_is_one_minus_the_share_of_edits():
    assert reward_of("levenshtein", "sitting", {"answer": "kitten"}) == pytest.approx(1 - 3 / 7)
    assert reward_of("levenshtein", " same ", {"answer": "same"}) == 1.0
    assert reward_of("levenshtein", "", {"answer": "abc"}) == 0.0


def test_lcs_ratio_is_the_f1_of_rouge_l():
    # Lin (2004), section 3.2: LCS of S1 and S2 is 3 of 4 words, of S1 and S3 it is 2
    s1 = {"answer": "police killed the gunman"}
    assert reward_of("lcs_ratio", "police kill the gunman", s1) == 0.75
    assert reward_of("lcs_ratio", "the gunman kill police", s1) == 0.5
    assert reward_of("lcs_ratio", "acb", {"answer": "abc"}, unit="characters") == pytest.approx(2 / 3)


def table_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def table_subsequence(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        previous = 0
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], previous + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


@given(TEXTS, TEXTS)
def test_bit_vectors_give_what_the_textbook_tables_give(a, b):
    assert edit_distance(a, b) == table_distance(a, b)
    assert common_subsequence(a, b) == table_subsequence(a, b)


@pytest.mark.parametrize(
    ("length", "score"), [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (101, -1)]
)
def test_overlong_has_the_figures_of_dapo(length, score):
    reward = resolve_reward("overlong", max_length=100, cache=20)
    assert reward("", "text" if length else "", tokens=[1] * length) == score


def test_length_penalty_falls_from_the_free_length_to_the_floor():
    reward = resolve_reward("length_penalty", free=2, slope=0.25, floor=-0.6, unit="words")
    assert [reward("", "w " * n) for n in (0, 2, 3, 4, 9)] == [0.0, 0.0, -0.25, -0.5, -0.6]


def test_rewards_that_count_tokens_say_so_when_there_are_none():
    with pytest.raises(ValidationError, match="overlong counts tokens"):
        reward_of("overlong", "text", max_length=10, cache=5)


@pytest.mark.parametrize(
    ("response", "score", "partial"),
    [
        ("<think>a</think><answer>b</answer>", 1.0, 1.0),
        (" <think>a</think>\n<answer>b</answer>\n", 1.0, 1.0),
        ("hm <think>a</think><answer>b</answer>", 0.0, 0.5),
        ("<answer>b</answer><think>a</think>", 0.0, 0.5),
        ("<think>a</think> so b", 0.0, 0.25),
        ("<think><think>a</think><answer>b</answer>", 0.0, 0.375),
        ("b", 0.0, 0.0),
    ],
)
def test_format_compliance_wants_the_tags_once_in_order_and_nothing_else(response, score, partial):
    assert reward_of("format_compliance", response) == score
    assert reward_of("format_compliance", response, partial=True) == partial


def test_repetition_is_the_share_of_repeated_ngrams():
    assert reward_of("repetition", "a b c d e") == 0.0
    assert reward_of("repetition", "a b c a b c a b c") == pytest.approx(-(1 - 3 / 7))
    assert reward_of("repetition", "no no no no", ngram=1, max_penalty=-2.0) == -1.5
    assert reward_of("repetition", "too short") == 0.0


COUNTDOWN = {"numbers": [25, 3, 4], "target": 100}


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("<think>25*4</think><answer>25 * 4 * (3 - 3)</answer>", 0.0),
        ("<answer>25 * 4</answer>", 0.0),
        ("<answer>(25 + 3) * 4</answer>", 0.1),
        ("<answer>25 / 0 + 3 * 4</answer>", 0.0),
        ("<answer>25 / (3 - 4)</answer>", 0.1),
        ("<answer>__import__('os').getpid()</answer>", 0.0),
        ("<answer>25 ** 3 ** 4</answer>", 0.0),
        ("<answer>" + "(" * 5000 + "</answer>", 0.0),
        ("25 3 4", 0.0),
        ("", 0.0),
    ],
)
def test_countdown_gives_nothing_for_what_is_no_solution(response, score):
    assert reward_of("countdown", response, COUNTDOWN, partial=0.1) == score


def test_countdown_computes_exactly_and_in_any_of_the_usual_signs():
    assert (
        reward_of("countdown", "thinking\n(7 − 8 ÷ 2) × 1 = 3", {"numbers": [7, 8, 2, 1], "target": 3}) == 1.0
    )
    assert (
        reward_of("countdown", r"So $\boxed{25 \times 4 = 100}$, as $3$ is left.", COUNTDOWN, use_all=False)
        == 1.0
    )
    assert reward_of("countdown", "8/(3-8/3)", {"numbers": [3, 3, 8, 8], "target": 24}) == 1.0
    assert reward_of("countdown", "25*4", COUNTDOWN, use_all=False) == 1.0
    assert reward_of("countdown", "25/0", {"numbers": [25, 0], "target": 1}, partial=0.1) == 0.1


CODE = "Here:\n```python\ndef add(a, b):\n    return a + b\n```"


@pytest.mark.parametrize(
    "response",
    [
        "```python3\ndef double(x):\n    return 2 * x\n```",
        "```Python title=a.py\r\ndef double(x):\r\n    return 2 * x\r\n```",
        "```bash\npip install it\n```\n```py\ndef double(x):\n    return 2 * x```\nRun:\n```sh\npython a.py\n```",
        "Cut by a stop string:\n```python\ndef double(x):\n    return 2 * x\n",
        "1. Define it:\n   ```python\n   def double(x):\n       return 2 * x\n   ```",
    ],
)
def test_code_is_found_however_its_block_is_fenced(response):
    assert reward_of("python_code", response, tests=["assert double(2) == 4"]) == 1.0


def test_nan_and_infinity_are_no_json():
    assert [reward_of("json_schema", text, schema={}) for text in ("[NaN]", "-Infinity", "[null]")] == [
        0,
        0,
        1,
    ]


def test_json_is_found_behind_a_block_of_another_language():
    response = "```python\nprint(1)\n```\nprints\n```JSON\r\n[1]\r\n```"
    assert reward_of("json_schema", response, schema={"type": "array"}) == 1.0


def test_python_code_runs_the_last_block_against_its_tests():
    assert (
        reward_of("python_code", CODE, {"tests": ["assert add(2, 2) == 4", "assert add(1, 0) == 1"]}) == 1.0
    )
    assert reward_of("python_code", CODE, tests="assert add(2, 2) == 5") == 0.0
    tests = ["assert add(2, 2) == 4", "assert add(2, 2) == 5"]
    assert reward_of("python_code", CODE, tests=tests, partial=True) == 0.5


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "print('0123456789abcdef0123456789abcdef 1')",
        "raise KeyboardInterrupt",
        "while True: pass",
        "this is no code",
        "import os\nassert os.environ.get('SECRET') == 'x'\npassed = True",
    ],
)
def test_code_that_does_not_pass_its_tests_scores_0(code, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert reward_of("python_code", code, tests="assert passed", timeout=0.5) == 0.0


def test_a_folder_of_code_goes_once_the_process_that_made_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    being_made = tmp_path / "tsnb-code-new"
    being_made.mkdir()
    with folder_of_its_own() as folder:
        Path(folder, "file").touch()
        copy = shutil.copytree(Path(folder).parent, tmp_path / "tsnb-code-left")  # its mark is held by nobody
        remove_left_behind()
        assert Path(folder, "file").exists() and being_made.exists() and not copy.exists()
    assert list(tmp_path.iterdir()) == [being_made]


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux")
def test_code_that_takes_too_much_memory_or_disk_scores_0(tmp_path):
    assert reward_of("python_code", "x = bytearray(1 << 31)", tests="pass") == 0.0
    large = f"open({str(tmp_path / 'large')!r}, 'wb').write(bytes(1 << 25))"
    assert reward_of("python_code", large, tests="pass") == 0.0


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        ("overlong", {"max_length": 10, "cache": 10}, "0 < cache < max_length"),
        ("overlong", {"max_length": 10, "cache": 5, "unit": "lines"}, "expected one of tokens"),
        ("overlong", {}, "signature"),
        ("length_penalty", {"slope": -1}, "slope ≥ 0"),
        ("regex", {"pattern": "("}, "no regular expression"),
        ("regex", {}, "signature"),
        ("json_schema", {"schema": {"type": "nonsense"}}, "no JSON Schema"),
        ("numeric_match", {"which": "best"}, "'last' or 'first'"),
        ("numeric_match", {"rel_tol": -1.0}, "below 0"),
        ("lcs_ratio", {"unit": "tokens"}, "'words' or 'characters'"),
        ("format_compliance", {"tags": "think"}, "expected names"),
        ("repetition", {"ngram": 0}, "ngram ≥ 1"),
        ("python_code", {"timeout": 0}, "timeout > 0"),
        ("exact_match", {"collumn": "x"}, "Did you mean 'column'"),
    ],
)
def test_keywords_that_cannot_work_are_refused_when_they_are_bound(name, kwargs, match):
    with pytest.raises(ValidationError, match=match):
        resolve_reward(name, **kwargs)
