"""Files that are either whole or absent, and JSON that every parser reads."""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

from tde_trainer.errors import UserError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write ``content`` so that a reader, or a crash, never sees half a file.

    Raises:
        UserError: the disk is full, or nothing may be written there; what was there before is whole.
    """
    data = content.encode() if isinstance(content, str) else content
    # Same directory, because a rename is atomic only within one file system. One name, because a killed process leaves
    # this file behind and the next one should take it over; only the main process writes.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


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
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
