"""Files that are either whole or absent, and JSON that every parser reads."""

from __future__ import annotations

import gzip
import json
import math
import os
import secrets
import zlib
from pathlib import Path
from typing import Any

from tde_trainer.errors import UserError

_PARTIAL = ".partial"  # the end of the name of a file that is not whole yet


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write ``content`` so that a reader, a crash or a loss of power never meets half a file.

    Raises:
        UserError: the disk is full, or nothing may be written there; what was there before is whole.
    """
    data = content.encode() if isinstance(content, str) else content
    # Beside it, because a rename is atomic only within one file system; by a name of its own, because two may write.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        make_folder(path.parent)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, so that a loss of power leaves their names in place."""
    if path.is_dir():
        return
    try:
        path.mkdir(exist_ok=True)
    except FileNotFoundError:
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_partial(path: Path) -> bool:
    """Whether it is what `write_atomic` leaves behind where it is killed."""
    return path.name.startswith(".") and path.suffix == _PARTIAL


def dumps(value: Any, indent: int | None = None) -> str:
    """Strict JSON: not-a-number and infinity become ``null``."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def read_json(path: Path) -> Any:
    """Parse a JSON file, plain or, where it is called so, gzipped.

    Raises:
        UserError: the file is missing, damaged or is not JSON.
    """
    try:
        content = path.read_bytes()
        return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (ValueError, OSError, EOFError, RecursionError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
