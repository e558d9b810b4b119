"""The one error that is the user's to fix."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Shown by the command line as a single line without a traceback; exit code 2."""

    def __init__(self, message: str) -> None:
        # A data loader raises the error of a worker anew, with the worker's whole traceback for a message.
        super().__init__(message.rstrip().rpartition(f"{__name__}.{type(self).__name__}: ")[2])


def unknown(what: str, given: str, known: Iterable[str]) -> UserError:
    """An error for an unknown name, with the nearest known one as a suggestion.

    Args:
        what: kind of the name, such as ``"recipe"``.
        given: what the user wrote.
        known: every accepted name.
    """
    names = sorted(known)
    nearest = get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(names)}"
    return UserError(f"unknown {what} {given!r}; {hint}")
