"""The fields of an entry in LVIS's JSON files, each checked as it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from reprlib import repr as shortened
from typing import Any, NoReturn

from tde_trainer.errors import UserError

Box = tuple[float, float, float, float]  # left, top, width, height in pixels
Segmentation = list[list[float]] | dict[str, Any]  # polygons [x, y, x, y, ...], or run lengths {size, counts}

WHOLE, NUMBER = (int, Integral), (float, int, Real)  # Python's own first, which is checked faster; numpy's too


class Entry:
    """A mapping of a JSON list.

    Args:
        place: where it stands, for people.
        content: what stands there.

    Raises:
        UserError: it is no mapping; of the methods: the field is missing or of another kind.
    """

    def __init__(self, place: str, content: Any) -> None:
        self.place = place
        if not isinstance(content, Mapping):
            raise UserError(f"{place} is {shortened(content)}; wanted is a mapping")
        self.content = content

    def __contains__(self, key: str) -> bool:
        return key in self.content

    def refuse(self, key: str, wanted: str) -> NoReturn:
        """Say that a field's value does not do."""
        raise UserError(f"{self.place}: {key} is {shortened(self.content[key])}; wanted is {wanted}")

    def whole(self, key: str, least: int | None = None) -> int:
        """A whole number, such as an id."""
        value = self._value(key)
        if not isinstance(value, WHOLE) or isinstance(value, bool) or (least is not None and value < least):
            self.refuse(key, "a whole number" if least is None else f"a whole number from {least}")
        return int(value)

    def number(self, key: str) -> float:
        """A finite number."""
        value = self._value(key)
        if not _is_number(value):
            self.refuse(key, "a finite number")
        return float(value)

    def text(self, key: str) -> str:
        """Text that is not empty."""
        value = self._value(key)
        if not isinstance(value, str) or not value:
            self.refuse(key, "text")
        return value

    def ids(self, key: str) -> frozenset[int]:
        """A list of whole numbers."""
        value = self._value(key)
        if not isinstance(value, list | tuple) or not all(isinstance(item, WHOLE) for item in value):
            self.refuse(key, "a list of ids")
        return frozenset(map(int, value))

    def box(self, key: str = "bbox") -> Box:
        """A box: four finite numbers, no side below 0."""
        value = self._value(key)
        if not isinstance(value, list | tuple) or len(value) != 4 or not all(map(_is_number, value)):
            self.refuse(key, "[left, top, width, height], four finite numbers")
        left, top, width, height = map(float, value)
        if width < 0 or height < 0:
            self.refuse(key, "[left, top, width, height], no side below 0")
        return left, top, width, height

    def segmentation(self, height: int, width: int, key: str = "segmentation") -> Segmentation:
        """Polygons, or run lengths of a mask of ``height`` x ``width``."""
        value: Segmentation = self._value(key)
        if isinstance(value, list):
            if not value or not all(isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in value):
                self.refuse(key, "polygons [x, y, x, y, x, y, ...], each of three points or more")
        elif not isinstance(value, dict) or not {"size", "counts"} <= value.keys():
            self.refuse(key, "a list of polygons, or run lengths {size, counts}")
        elif value["size"] not in ([height, width], (height, width)):
            self.refuse(key, f"of the image's size, [{height}, {width}]")
        return value

    def _value(self, key: str) -> Any:
        try:
            return self.content[key]
        except KeyError:
            raise UserError(f"{self.place}: has no {key}; it has {', '.join(self.content)}") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, NUMBER) and not isinstance(value, bool) and math.isfinite(value)
