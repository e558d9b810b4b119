"""Whether JSON has the form that was wanted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

NUMBER = (int, float, type(None))  # null stands for what is undefined


def misfits(value: Any, wanted: Any, place: str = "") -> Iterator[str]:
    """The places in ``value`` that are not as ``wanted``, in words.

    Args:
        value: of `json.loads`.
        wanted: a type or several; ``{key: wanted}`` of a mapping, which may have more keys; ``[wanted]`` of a list, for
            each of its items.
        place: where in the file it stands.
    """
    kind = type(wanted) if isinstance(wanted, dict | list) else wanted
    if not isinstance(value, kind):
        yield f"{place or 'it'} is {'null' if value is None else f'a {type(value).__name__}'}"
    elif isinstance(wanted, dict):
        for key, of_key in wanted.items():
            inside = f"{place}.{key}" if place else key
            yield from misfits(value[key], of_key, inside) if key in value else [f"it lacks {inside}"]
    elif isinstance(wanted, list):
        for index, item in enumerate(value):
            yield from misfits(item, wanted[0], f"{place}[{index}]")
