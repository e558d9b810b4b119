"""Docstrings name functions by role, ``:func:`name```: on the site that is a link to where the reference has them."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:func|class|meth|data|mod):`~?([\w.]+)`")


class Roles(Extension):
    """Turns the roles of every docstring into cross-references."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called by griffe for each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"[`\1`][\1]", obj.docstring.value)
