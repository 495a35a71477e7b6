"""An extension of griffe, which reads the code for the reference: it adds what only running the code shows."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from griffe import Alias, Class, Docstring, Expr, ExprSubscript, ExprTuple, Extension, Module, Object

from compressor.config_fields import config_fields


class Reference(Extension):
    """Describes fields of configs and settings of schemes, and takes examples for what they are."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Gives examples the title by which they are known to be code, and takes the second colon off before blocks."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)

    def on_module_members(self, *, mod: Module, **_: Any) -> None:
        """Has pydantic's dataclasses read as Python's, whose arguments are their fields."""
        decorator = mod.members.get("dataclass")
        if isinstance(decorator, Alias) and decorator.target_path == "pydantic.dataclasses.dataclass":
            decorator.target_path = "dataclasses.dataclass"

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        """Shows ``int`` of ``Annotated[int, Field(ge=1)]``, and describes the fields that ``config_field`` makes."""
        for attribute in cls.attributes.values():
            attribute.annotation = _plain(attribute.annotation)
        if any("config_field(" in str(attribute.value) for attribute in cls.attributes.values()):
            for one in config_fields(getattr(import_module(cls.module.path), cls.name)):
                attribute = cls.attributes[one.name]
                attribute.value, attribute.docstring = repr(one.default), Docstring(one.help, parent=attribute)


def _plain(annotation: str | Expr | None) -> str | Expr | None:
    if isinstance(annotation, ExprSubscript) and str(annotation.left) == "Annotated":
        return annotation.slice.elements[0] if isinstance(annotation.slice, ExprTuple) else annotation
    return annotation
