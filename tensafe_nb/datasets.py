"""Real training data without a download.

Prose comes from the docstrings of the running Python's standard library, read with `ast` from the source
files: nothing is imported, so nothing runs. Arithmetic comes from a counter. Text is split by module, sums by
a stable hash, so held-out means held out.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError

__all__ = ["HELDOUT_MODULES", "TRAIN_MODULES", "docstring_pairs", "pretraining_texts", "sums"]

Split = Literal["train", "heldout"]
Kind = Literal["module", "class", "function", "method"]
Documentable = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

TRAIN_MODULES = (
    "argparse", "asyncio", "bdb", "bz2", "cmd", "codecs", "collections", "concurrent", "configparser",
    "contextlib", "datetime", "dis", "doctest", "email", "enum", "ftplib", "functools", "html", "http",
    "imaplib", "importlib", "inspect", "ipaddress", "locale", "logging", "lzma", "mailbox", "mimetypes",
    "multiprocessing", "numbers", "optparse", "os", "pdb", "pickle", "pkgutil", "poplib", "pydoc",
    "selectors", "site", "smtplib", "socket", "socketserver", "ssl", "subprocess", "sysconfig", "tarfile",
    "threading", "timeit", "trace", "traceback", "tracemalloc", "typing", "unittest", "urllib", "uuid",
    "warnings", "weakref", "webbrowser", "wsgiref", "zipimport",
)  # fmt: skip
HELDOUT_MODULES = (
    "abc", "ast", "base64", "bisect", "calendar", "copy", "csv", "dataclasses", "difflib", "filecmp",
    "fileinput", "fnmatch", "fractions", "getpass", "glob", "graphlib", "gzip", "heapq", "hmac", "json",
    "linecache", "pathlib", "platform", "pprint", "queue", "random", "sched", "secrets", "shelve", "shlex",
    "shutil", "statistics", "string", "symtable", "tempfile", "textwrap", "tokenize", "tomllib", "types",
    "wave", "zipfile", "zoneinfo",
)  # fmt: skip

_SKIPPED = {
    "antigravity", "encodings", "idle_test", "idlelib", "lib2to3", "site-packages", "test", "tests", "this",
    "turtledemo",
}  # fmt: skip
_COMPLETION_CHARS = (15, 120)
_PROMPT_CHARS = 120
_HELP_TOPIC_CHARS = 1500
_SUMS_HELDOUT_PERCENT = 10


@checked
def docstring_pairs(split: Split) -> list[dict[str, str]]:
    r"""Signatures and the first sentence of their docstrings, for fine-tuning a model to document code.

    Args:
        split: `"train"` reads `TRAIN_MODULES`, `"heldout"` reads `HELDOUT_MODULES`.

    Returns:
        Pairs such as `{"prompt": "heapq.heappop(heap)\n", "completion": "Pop the smallest item off ..."}` in
        a fixed order. No completion occurs twice, within a split or across the two.

    Raises:
        ValidationError: the split has another name.
    """
    _check_split(split)
    return [{"prompt": prompt, "completion": text} for text, prompt in completions_of(split).items()]


def pretraining_texts() -> list[str]:
    """Help pages of every other module, for training a base model that has not seen the pairs.

    Returns:
        One text for each documented function, class and module outside `TRAIN_MODULES` and
        `HELDOUT_MODULES`, and Python's own help topics. A text that contains a completion of
        `docstring_pairs` is left out.
    """
    fine_tuned = {*TRAIN_MODULES, *HELDOUT_MODULES}
    packages = {path.parent.name for path in standard_library().glob("*/__init__.py")}
    files = {path.stem for path in standard_library().glob("*.py")}
    modules = sorted((packages | files) - _SKIPPED - fine_tuned)
    texts = dict.fromkeys(text for name in modules for text in help_texts_of(name))
    # the base model must not have seen what fine-tuning is to teach it
    contains_completion = phrase_finder([*completions_of("train"), *completions_of("heldout")])
    return [text for text in texts if not contains_completion(_one_line(text))]


@checked
def sums(count: int, *, seed: int, split: Split = "train") -> list[dict[str, str]]:
    """Additions of two-digit numbers with their answers, for training and for rewards that can be checked.

    Args:
        count: how many to draw; none comes twice unless `count` exceeds the split.
        seed: the same seed draws the same sums.
        split: a tenth of the 10,000 pairs, chosen by a stable hash, is `"heldout"`.

    Returns:
        Items such as `{"prompt": "12+34=", "answer": "046"}`.

    Raises:
        ValidationError: the split has another name, or `count` is negative.
    """
    _check_split(split)
    if count < 0:
        raise ValidationError(f"count must be 0 or more, got {count}.")
    pairs, rng = list(sum_pairs(split)), random.Random(seed)
    drawn: list[tuple[int, int]] = []
    while len(drawn) < count:
        drawn += rng.sample(pairs, min(count - len(drawn), len(pairs)))
    return [{"prompt": f"{a:02d}+{b:02d}=", "answer": f"{a + b:03d}"} for a, b in drawn]


def _check_split(split: str) -> None:
    if split not in ("train", "heldout"):
        raise ValidationError(f"split must be 'train' or 'heldout', got {as_given(split)}.")


@cache
def sum_pairs(split: Split) -> tuple[tuple[int, int], ...]:
    """All pairs of numbers below 100 that belong to a split."""

    def is_heldout(a: int, b: int) -> bool:
        digest = hashlib.sha256(f"{a:02d}+{b:02d}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % 100 < _SUMS_HELDOUT_PERCENT

    every = ((a, b) for a in range(100) for b in range(100))
    return tuple(pair for pair in every if is_heldout(*pair) == (split == "heldout"))


@dataclass(frozen=True, slots=True)
class Documented:
    """A module, class, function or method that has a docstring, without the syntax tree it came from."""

    kind: Kind
    path: str  # dotted, from the top-level module's name: "collections.Counter.update"
    arguments: str  # parameters, or the bases of a class
    doc: str

    @classmethod
    def within(cls, node: Documentable, kind: Kind, path: str) -> Iterator[Documented]:
        """Depth first. What a function defines inside itself is nobody's interface."""
        if doc := ast.get_docstring(node):
            yield cls(kind, path, arguments_of(node), doc)
        for child in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
            if isinstance(child, ast.ClassDef):
                yield from cls.within(child, "class", f"{path}.{child.name}")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from cls.within(
                    child, "function" if kind == "module" else "method", f"{path}.{child.name}"
                )

    def signature(self, name: str, arguments: str) -> str:
        if self.kind in ("module", "class"):
            return f"{self.kind} {name}({arguments})" if arguments else f"{self.kind} {name}"
        return f"{name}({arguments})"

    @property
    def prompt(self) -> str:
        own = re.sub(r"^(self|cls)(, |$)", "", self.arguments) if self.kind == "method" else self.arguments
        return self.signature(self.path, own) + "\n"

    @property
    def first_sentence(self) -> str:
        paragraph = _one_line(self.doc.strip().split("\n\n")[0])
        return re.split(r"(?<=[a-z)\]'\"`]\.) (?=[A-Z])", paragraph, maxsplit=1)[0]

    @property
    def help_text(self) -> str:
        """Unlike the prompts of the pairs: a short name, `self`, the whole docstring indented."""
        name = self.path if self.kind == "module" else self.path.rpartition(".")[2]
        doc = "\n".join(f"    {line}".rstrip() for line in self.doc.strip().splitlines())
        return f"{self.signature(name, self.arguments)}\n{doc}"

    @property
    def makes_a_pair(self) -> bool:
        """Whether it is public, and its first sentence prose of a length that can be learnt."""
        (low, high), completion = _COMPLETION_CHARS, self.first_sentence
        is_public = not re.search(r"(^|\.)_(?!_)", self.path)
        is_prose = completion[:1].isupper() and " " in completion and not re.search("->|>>>", completion)
        return is_public and is_prose and low <= len(completion) <= high and len(self.prompt) <= _PROMPT_CHARS


def arguments_of(node: Documentable) -> str:
    """Parameters without their annotations, which would take up half of a prompt; the bases of a class."""
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        return ", ".join(ast.unparse(base) for base in node.bases)
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(node.args)


@cache
def completions_of(split: Split) -> dict[str, str]:
    """Completion -> prompt. The modules held out are read only for those who ask for them."""
    if split == "train":
        return pairs_of(TRAIN_MODULES, taken=set())
    return pairs_of(HELDOUT_MODULES, taken=set(completions_of("train")))


def pairs_of(modules: Sequence[str], taken: set[str]) -> dict[str, str]:
    """Completion -> prompt, of what is documented in some modules; neither is in `taken`, or comes twice."""
    pairs: dict[str, str] = {}
    for item in (item for name in modules for item in documented_in(name) if item.kind != "module"):
        prompt, text = item.prompt, item.first_sentence
        if item.makes_a_pair and taken.isdisjoint((prompt, text)):
            pairs[text] = prompt
            taken |= {prompt, text}
    return pairs


def _one_line(text: str) -> str:
    return " ".join(text.split())


def help_texts_of(module: str) -> Iterator[str]:
    """Yield the docstrings of a module; of `pydoc_data`, the pages of `help("topics")` besides, cut short."""
    yield from (item.help_text for item in documented_in(module))
    for _, tree in sources_of(module) if module == "pydoc_data" else ():
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):  # of topics.py
                for page in ast.literal_eval(node.value).values():
                    yield from cut_at_paragraphs(page)


def cut_at_paragraphs(page: str) -> Iterator[str]:
    """Yield a long page in parts that a model can learn."""
    text = ""
    for paragraph in page.strip().split("\n\n"):
        if text and len(text) + len(paragraph) > _HELP_TOPIC_CHARS:
            yield text
            text = ""
        text = f"{text}\n\n{paragraph}" if text else paragraph
    yield text


@cache
def documented_in(module: str) -> tuple[Documented, ...]:
    """In source order, all files of a top-level module; empty where this Python lacks it."""
    return tuple(
        item for name, tree in sources_of(module) for item in Documented.within(tree, "module", name)
    )


def sources_of(module: str) -> Iterator[tuple[str, ast.Module]]:
    """Dotted name and syntax tree of each file. Trees are heavy: one at a time, never kept."""
    single = standard_library() / f"{module}.py"
    for path in [single] if single.is_file() else sorted((standard_library() / module).rglob("*.py")):
        parts = path.relative_to(standard_library()).with_suffix("").parts
        if not _SKIPPED & set(parts):
            yield ".".join(parts).removesuffix(".__init__"), ast.parse(path.read_bytes())


@cache
def standard_library() -> Path:
    """The folder of this Python's own modules."""
    return Path(sysconfig.get_paths()["stdlib"])


def phrase_finder(phrases: Sequence[str]) -> Callable[[str], bool]:
    """A test whether a text contains any of many phrases, which looks up each position of the text once."""
    width = _COMPLETION_CHARS[0]
    by_head: dict[str, list[str]] = {}
    for phrase in phrases:
        by_head.setdefault(phrase[:width], []).append(phrase)

    def contains(text: str) -> bool:
        starts = range(len(text) - width + 1)
        found = ((start, by_head.get(text[start : start + width], ())) for start in starts)
        return any(text.startswith(phrase, start) for start, candidates in found for phrase in candidates)

    return contains
