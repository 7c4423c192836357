"""A YAML file from a stranger: small in bytes, and still bounded in what it makes us build."""

from pathlib import Path

import pytest

from tensafe_nb.errors import ValidationError
from tensafe_nb.recipes.yaml_file import DEEPEST, LARGEST, MOST_NODES, YamlFile


def read(tmp_path: Path, text: str) -> object:
    path = tmp_path / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return YamlFile.read(path).data


def laughs(levels: int, width: int) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]" for level in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (laughs(9, 9), rf"line \d+: .*more than {MOST_NODES:,} values, aliases counted"),
        (
            laughs(4, 4).replace("[", "{k: [").replace("]", "]}").replace("x", "[" * 60 + "]" * 60),
            "levels deep",
        ),
        ("[" * 100_000, f"more than {DEEPEST} levels deep"),
        ("{a: " * 200 + "1" + "}" * 200, f"more than {DEEPEST} levels deep"),
        ("- " * 3000 + "x", f"more than {DEEPEST} levels deep"),
        ("a: &x {b: {c: *x}}", r"\*x stands inside itself"),
        ("? [1, 2]\n: x", "must be text"),
        ("? {a: 1}\n: x", "must be text"),
        ("a: !!python/object:os.system x", "the tag"),
        ("a: !!timestamp nonsense", "the tag"),
        ("a: !!binary nonsense", "the tag"),
        ("a: *nowhere", "undefined alias"),
        ("a: " + "9" * 10_000, "cannot be read"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: \x00", "cannot be read"),
        ("x: " + "y" * LARGEST, "larger than"),
        (", ".join(["1"] * (MOST_NODES + 1)).join("[]"), "values"),
    ],
)
def test_what_would_cost_too_much_is_refused_with_its_reason(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        read(tmp_path, text)


def test_an_anchor_that_is_used_twice_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, "a: &one {b: [1, 2]}\nc: [*one, *one]") == {
        "a": {"b": [1, 2]},
        "c": [{"b": [1, 2]}] * 2,
    }


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(ValidationError, match="cannot be read"):
            YamlFile.read(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    for content in (b"\xff\xfe\x00", b"a: \xc3", b"\x80"):
        path.write_bytes(content)
        with pytest.raises(ValidationError, match="cannot be read"):
            YamlFile.read(path)


@pytest.mark.parametrize("escape", ["UFFFFFFFF", "U00110000", "UZZZZZZZZ"])
def test_an_escape_that_is_no_character_is_refused(tmp_path: Path, escape: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f'model: "\\{escape}"\n')
    with pytest.raises(ValidationError, match=r"recipe\.yaml"):
        YamlFile.read(path)
