"""Atomic files and strict JSON."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import pytest
from tde_trainer.errors import UserError
from tde_trainer.files import dumps, is_partial, read_json, write_atomic


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    write_atomic(path, "old")

    def no_space(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, no_space)
    with pytest.raises(UserError) as error:
        write_atomic(path, "new, and longer")
    assert str(error.value) == f"cannot write {path}: No space left on device"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*runs/a/results\.json: Not a directory"):
        write_atomic(tmp_path / "runs/a/results.json", "new")


def test_content_is_on_disk_before_the_name_is_and_the_names_are_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        steps.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("replace"), replace(a, b)))
    write_atomic(tmp_path / "new" / "file", b"content")
    *before, partial, replaced, folder = steps
    assert before == [tmp_path.name] and is_partial(Path(partial)) and (replaced, folder) == ("replace", "new")
    assert (tmp_path / "new" / "file").read_bytes() == b"content"


def test_two_who_write_at_once_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = tmp_path / "file", os.replace

    def meanwhile(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        write_atomic(path, "the other's")
        replace(source, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    write_atomic(path, "ours, which is longer")
    assert path.read_text() == "ours, which is longer" and list(tmp_path.iterdir()) == [path]


def test_what_is_not_finite_becomes_null() -> None:
    text = dumps({"few": float("nan"), "curve": [1.0, float("inf")], "pair": (float("-inf"),)})
    assert json.loads(text, parse_constant=pytest.fail) == {"few": None, "curve": [1.0, None], "pair": [None]}


def test_unreadable_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"cannot read .*half.json"):
        read_json(tmp_path / "half.json")
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["whole.json", "whole.json.gz"])
def test_json_is_read_plain_or_gzipped(name: str, tmp_path: Path) -> None:
    path, text = tmp_path / name, '{"a": "é"}'.encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    assert read_json(path) == {"a": "é"}
    if path.suffix == ".gz":
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(UserError, match=f"cannot read {path}: "):
            read_json(path)
