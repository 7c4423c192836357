"""Columns by name: which one is asked, which one answers, and a template that makes a text of several."""

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from tensafe_nb.data.values import kind_of, missing
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError, nearest

GSM8K = "####"  # what stands before the answer in GSM8K's solutions (Cobbe et al. 2021, arXiv:2110.14168)


@dataclass(frozen=True, slots=True)
class PromptColumns:
    """How a row becomes a prompt with its answer; without any of these, rows stay as they are.

    Args:
        prompt: The column that is asked.
        answer: The column that holds the right answer; it becomes the column "answer", which rewards read.
        answer_after: Of a solution that ends in its answer, what stands before that: "####" for GSM8K. "" takes the
            solution as it is.
        template: A text with the names of columns in braces, as "Question: {question}"; it becomes the prompt.

    Raises:
        ValidationError: A template without columns, or with what is no name of one.
    """

    prompt: str | None = None
    answer: str | None = None
    answer_after: str | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "answer", "answer_after", "template"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or (not value and name != "answer_after")):
                raise ValidationError(f"{name}={as_given(value)} is a text: {_MEANT[name]}.")
        if self.answer_after is not None and self.answer is None:
            raise ValidationError(
                "answer_after says where in a column the answer begins: name the column, answer=…."
            )
        if self.template is not None and not self.fields:
            raise ValidationError(
                f"template={as_given(self.template)} names no column: write one in braces: 'Q: {{question}} A:'."
            )

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.prompt, self.answer, self.template))

    @property
    def fields(self) -> list[str]:
        """The columns that the template names.

        Raises:
            ValidationError: Its braces do not fit, or hold something else than a name.
        """
        try:
            pieces = list(Formatter().parse(self.template or ""))
        except ValueError as error:
            raise ValidationError(
                f"template={as_given(self.template)}: {error}. A brace that is meant is written twice: {{{{ or }}}}."
            ) from error
        for _, name, form, conversion in pieces:
            if name is not None and (form or conversion or not name or not _is_name(name)):
                shown = f"{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}"
                raise ValidationError(
                    f"template: {{{shown}}} is no column: between braces stands the name of one, and nothing else. A "
                    f"brace that is meant is written twice."
                )
        return [name for _, name, _, _ in pieces if name is not None]

    def of(self, row: Any) -> Any:
        """Return a row with its `prompt` and `answer` where rewards and samplers look for them.

        Raises:
            ValidationError: It has no such column, or something in it that cannot be asked.
        """
        if not self:
            return row
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, Mapping):
            raise ValidationError(
                f"it is {kind_of(row)}: prompt=, answer= and template= name columns of a dict."
            )
        made = dict(row)
        if self.prompt is not None:
            made |= {"prompt": self._taken(made, row, "prompt", self.prompt)}
        if self.template is not None:
            made["prompt"] = self.filled({**made, **row})
        if self.answer is None and isinstance(made.get("answer"), str) and GSM8K in made["answer"]:
            raise holds_a_solution("answer", "answer='answer', ")
        if self.answer is not None:
            made |= {"answer": self.extracted(self._taken(made, row, "answer", self.answer))}
        return made

    def filled(self, values: Mapping[str, Any]) -> str:
        """Return the template with the values of a row in it."""
        found: dict[str, str] = {}
        for name in self.fields:
            value = column_of(values, name, "template")
            if missing(value) or not isinstance(value, str | int | float):
                raise ValidationError(
                    f"template: the column {as_given(name)} is {kind_of(value)}; a text or a number can be filled in."
                )
            found[name] = str(value)
        return (self.template or "").format_map(found)

    def extracted(self, answer: Any) -> Any:
        """Return the answer that a solution ends in."""
        if self.answer_after is None:
            if isinstance(answer, str) and GSM8K in answer:
                raise holds_a_solution(self.answer, "")
            return answer
        if not self.answer_after:
            return answer
        if not isinstance(answer, str) or self.answer_after not in answer:
            raise ValidationError(
                f"the column {as_given(self.answer)} has no {as_given(self.answer_after)} (answer_after), before which "
                f"a solution would stand: {as_given(answer)}."
            )
        found = answer.rpartition(self.answer_after)[2].strip()
        if not found:
            raise ValidationError(
                f"the column {as_given(self.answer)} has nothing behind {as_given(self.answer_after)} (answer_after)."
            )
        return found

    def _taken(self, made: dict[str, Any], row: Mapping[str, Any], place: str, name: str) -> Any:
        """Take a column out of a row, to be put in its place."""
        value = column_of(row, name, f"{place}={name!r}")
        if missing(value):
            raise ValidationError(f"the column {as_given(name)} is {kind_of(value)}.")
        if name != place and place in row:
            raise ValidationError(
                f"it has a column {as_given(place)} besides {as_given(name)}, and {place}={as_given(name)} would put "
                f"the one in the other's place: leave {place}= out, or drop a column."
            )
        made.pop(name, None)
        return value


_MEANT = {
    "prompt": "the name of a column",
    "answer": "the name of a column",
    "answer_after": "what stands before the answer, '####' for GSM8K",
    "template": "such as 'Q: {question}\\nA:'",
}


def holds_a_solution(column: str | None, named: str) -> ValidationError:
    """Return the error of an answer that is a whole solution: never taken for the answer in silence."""
    return ValidationError(
        f"the column {as_given(column)} holds a solution, its answer behind {GSM8K!r} as in GSM8K: say "
        f"{named}answer_after={GSM8K!r} to take what stands behind it, or {named}answer_after='' to take it as it is."
    )


def _is_name(name: str) -> bool:
    """Whether what stands between braces names a column, and reaches into nothing."""
    return not any(mark in name for mark in ".[]") and not name.isdigit()


def column_of(row: Mapping[str, Any], name: str, who: str) -> Any:
    """Return a column of a row.

    Raises:
        ValidationError: There is none of this name; with the nearest one.
    """
    if name not in row:
        names = sorted(map(str, row))
        raise ValidationError(
            f"{who}: there is no column {as_given(name)}; it has {', '.join(names)}.{nearest(name, names)}"
        )
    return row[name]
