"""Atomic files and strict JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tde_trainer.errors import UserError
from tde_trainer.files import dumps, read_json, write_atomic


def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    write_atomic(path, "old")

    def no_space(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "new, and longer")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("replace"), replace(a, b)))
    write_atomic(tmp_path / "new" / "file", b"content")
    assert steps == ["fsync", "replace"] and (tmp_path / "new" / "file").read_bytes() == b"content"


def test_what_is_not_finite_becomes_null() -> None:
    text = dumps({"few": float("nan"), "curve": [1.0, float("inf")], "pair": (float("-inf"),)})
    assert json.loads(text, parse_constant=pytest.fail) == {"few": None, "curve": [1.0, None], "pair": [None]}


def test_unreadable_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"cannot read .*half.json"):
        read_json(tmp_path / "half.json")
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "none.json")
