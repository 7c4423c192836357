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
        if not is_config(cls):
            return
        fields = fields_of(cls)
        parameters = [
            griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword),
            *(
                griffe.Parameter(f.name, annotation=f.annotation, kind=KEYWORD, default=default(f))
                for f in fields
            ),
        ]
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters)))


def is_config(cls: griffe.Class) -> bool:
    """Whether it is a `Config`, or a subclass of one in the same file."""
    bases = [str(base) for base in cls.bases]
    above = cls.parent.members.get(bases[0]) if len(bases) == 1 and cls.parent else None
    return bases == ["Config"] or (isinstance(above, griffe.Class) and is_config(above))


def fields_of(cls: griffe.Class) -> list[Any]:
    """Return the fields of a configuration, those it inherits first."""
    own = [member for member in cls.members.values() if member.is_attribute and member.annotation]
    above = cls.parent.members.get(str(cls.bases[0])) if cls.parent else None
    inherited = fields_of(above) if isinstance(above, griffe.Class) and is_config(above) else []
    return [*inherited, *(field for field in own if "property" not in field.labels)]


def default(field: griffe.Attribute) -> Any:
    """Return a field's default: what stands behind `=`, or what `pydantic.Field(…)` says."""
    value = field.value
    if not isinstance(value, griffe.ExprCall) or str(value.function) != "pydantic.Field":
        return value
    given = {argument.name: argument.value for argument in value.arguments}
    return given.get("default", "{}" if "default_factory" in given else None)
