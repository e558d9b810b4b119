"""What the reference reads out of docstrings and comments beyond what griffe does."""

from __future__ import annotations

import re
from typing import Any

from griffe import Attribute, Docstring, Extension, Object

ROLE = re.compile(r":(?:func|class|meth|data|mod):`~?([\w.]+)`")
COMMENT = re.compile(r"  # (.+)$")


class Docstrings(Extension):
    """Roles become links, and the comment beside a field its description."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Turns ``:func:`name``` into a cross-reference. Called by griffe for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"[`\1`][\1]", obj.docstring.value)

    def on_attribute(self, *, attr: Attribute, **kwargs: Any) -> None:
        """Takes the comment at the end of the line. Called by griffe for each attribute that it has read."""
        comment = COMMENT.search(attr.source)
        if attr.docstring is None and comment and attr.parent and attr.parent.is_class:
            attr.docstring = Docstring(comment[1], parent=attr, lineno=attr.lineno)
