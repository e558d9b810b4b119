"""What the reference reads out of docstrings and comments beyond what griffe does."""

from __future__ import annotations

import re
from typing import Any

from griffe import Attribute, Class, Docstring, Extension, Object

ROLE = re.compile(r":(?:func|class|meth|data|mod):`~?([\w.]+)`")
COMMENT = re.compile(r"  # (.+)$")


class Docstrings(Extension):
    """Roles become links, and the comments beside a class's fields a list of them."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Turns ``:func:`name``` into a cross-reference. Called by griffe for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"[`\1`][\1]", obj.docstring.value)

    def on_class(self, *, cls: Class, **kwargs: Any) -> None:
        """Describes fields by what stands at the end of their lines. Called by griffe for each class."""
        fields = [member for member in cls.members.values() if isinstance(member, Attribute) and not member.docstring]
        described = {field.name: found[1] for field in fields if (found := COMMENT.search(field.source))}
        if described and "Attributes:" not in (cls.docstring.value if cls.docstring else ""):
            lines = [f"    {name}: {comment}" for name, comment in described.items()]
            cls.docstring = cls.docstring or Docstring("", parent=cls)
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)
