"""For the API reference: what griffe, which reads the package without running it, would not see by itself."""

from textwrap import indent
from typing import Any

import griffe

KEYWORD = griffe.ParameterKind.keyword_only


class Reference(griffe.Extension):
    """Configurations with their fields as parameters, as they are called; examples and trees as code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            paragraphs = [indent(part, "    ") if "├──" in part else part for part in text.split("\n\n")]
            obj.docstring.value = "\n\n".join(paragraphs)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give a subclass of `tensafe_nb.config.Config` the `__init__` that pydantic makes at run time."""
        if [str(base) for base in cls.bases] != ["Config"]:
            return
        fields = [member for member in cls.members.values() if member.is_attribute and member.annotation]
        parameters = [
            griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword),
            *(
                griffe.Parameter(f.name, annotation=f.annotation, kind=KEYWORD, default=default(f))
                for f in fields
            ),
        ]
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters)))


def default(field: griffe.Attribute) -> Any:
    """Return a field's default: what stands behind `=`, or what `pydantic.Field(…)` says."""
    value = field.value
    if not isinstance(value, griffe.ExprCall) or str(value.function) != "pydantic.Field":
        return value
    given = {argument.name: argument.value for argument in value.arguments}
    return given.get("default", "{}" if "default_factory" in given else None)
