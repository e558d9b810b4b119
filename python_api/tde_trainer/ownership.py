"""Folders that one process at a time writes to."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tde_trainer.errors import UserError

log = logging.getLogger(__name__)
_held: set[int] = set()  # descriptors of the folders that this process owns


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Inside the block no other process of this machine owns the folder; one that dies owns nothing any more.

    Raises:
        UserError: another does.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use: another process is training there") from None
        except OSError as error:
            log.warning(
                "%s cannot be locked (%s): see to it that no other process trains there", folder, error.strerror
            )
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _disown() -> None:
    # A worker of a data loader may outlive its trainer by seconds, and is not to hold its folder for as long.
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_disown)
