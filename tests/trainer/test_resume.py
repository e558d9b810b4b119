"""Interrupting and resuming: the same bits as an uninterrupted run, and a clear word when it can't be."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tde_trainer import checkpoint
from tde_trainer.config import load_config
from tde_trainer.errors import UserError
from tde_trainer.methods import METHODS
from tde_trainer.network import build_network
from tde_trainer.progress import Reporter
from trainer_tools import TINY, Tde

RECIPE = ["train", "digits_lt", *TINY, "train.epochs=4", "methods=[deconfound]", "seeds=[0,1]"]


def tensors(run: Path, seed: int) -> dict[str, Any]:
    content = torch.load(run / f"deconfound/seed{seed}" / checkpoint.FILE, weights_only=True)
    momentum = {str(key): state["momentum_buffer"] for key, state in content["optimizer"].items()}
    return {**content["network"], **momentum}


def assert_same_bits(run: Path, other: Path) -> None:
    for seed in (0, 1):
        first, second = tensors(run, seed), tensors(other, seed)
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tde: Tde) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert tde(*RECIPE, f"out={run}").exit_code == 0
    return run


def interrupt(run: Path, tde: Tde, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in the second cell: after an epoch, or in the middle of one."""
    calls = 0

    def counted(original: Any, at: int) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        if where == "between epochs":
            patch.setattr(Reporter, "epoch_done", counted(Reporter.epoch_done, 4 + 2))
        else:
            steps = 4 * 6 + 6 + 3  # six steps an epoch: the second epoch of the second cell, half way
            method = type(METHODS["deconfound"])
            patch.setattr(method, "loss", counted(method.loss, steps))
        result = tde(*RECIPE, f"out={run}")
    assert result.exit_code == 130 and "resume=true" in result.output


@pytest.mark.parametrize("where", ["between epochs", "within an epoch"])
def test_a_resumed_run_ends_in_the_same_bits(
    where: str, whole: Path, tmp_path: Path, tde: Tde, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    interrupt(run, tde, where, monkeypatch)
    assert (run / "deconfound/seed0/results.json").exists() and not (run / "deconfound/seed1/results.json").exists()
    lost_at = len((run / "deconfound/seed1/metrics.jsonl").read_text().splitlines())
    assert lost_at == (2 if where == "between epochs" else 1)
    finished = (run / "deconfound/seed0/results.json").stat().st_mtime_ns

    result = tde(*RECIPE, f"out={run}", "resume=true")

    assert result.exit_code == 0 and "deconfound seed 0: already finished" in result.output
    assert (run / "deconfound/seed0/results.json").stat().st_mtime_ns == finished
    assert_same_bits(whole, run)
    for seed in (0, 1):
        ours, theirs = (json.loads((r / f"deconfound/seed{seed}/results.json").read_text()) for r in (run, whole))
        assert [ours[key] for key in ("accuracy", "alpha", "sweep")] == [
            theirs[key] for key in ("accuracy", "alpha", "sweep")
        ]
        rows = [json.loads(line) for line in (run / f"deconfound/seed{seed}/metrics.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in rows] == [1, 2, 3, 4]


def test_seeds_differ(whole: Path) -> None:
    assert not torch.equal(tensors(whole, 0)["head.weight"], tensors(whole, 1)["head.weight"])


def test_metrics_ahead_of_the_checkpoint_are_dropped(
    whole: Path, tmp_path: Path, tde: Tde, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    interrupt(run, tde, "between epochs", monkeypatch)
    metrics = run / "deconfound/seed1/metrics.jsonl"
    with open(metrics, "a") as file:
        file.write('{"epoch": 3, "loss": 0.1}\n')  # as left by a crash between metrics and checkpoint
    assert tde(*RECIPE, f"out={run}", "resume=true").exit_code == 0
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] and rows[2]["loss"] != 0.1
    assert_same_bits(whole, run)


def test_a_full_disk_leaves_the_checkpoint_before_it_to_go_on_from(
    whole: Path, tmp_path: Path, tde: Tde, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, replace = tmp_path / "run", os.replace
    path = run / "deconfound/seed0" / checkpoint.FILE

    def full(source: Path, target: Path) -> None:
        if target == path and path.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        result = tde(*RECIPE, f"out={run}")
    assert result.exit_code == 2
    assert result.stderr == f"error: cannot write {path}: No space left on device\n"
    assert torch.load(path, weights_only=True)["progress"]["epochs_done"] == 1
    assert sorted(file.name for file in path.parent.iterdir()) == [checkpoint.FILE, "metrics.jsonl"]
    assert tde(*RECIPE, f"out={run}", "resume=true").exit_code == 0
    assert_same_bits(whole, run)


def test_a_directory_in_use_is_refused(whole: Path, tde: Tde) -> None:
    result = tde(*RECIPE, f"out={whole}")
    assert result.exit_code == 2 and "is not empty: resume=true" in result.output


def test_a_run_goes_on_with_its_images_elsewhere(whole: Path, tmp_path: Path, tde: Tde) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = json.loads((run / "run.json").read_text())
    result = tde(*RECIPE, f"out={run}", "resume=true", "data.root=elsewhere", "data.download=true")
    assert result.exit_code == 0 and result.output.count("already finished") == 2, result.output
    after = json.loads((run / "run.json").read_text())
    assert after["config"]["data"] == {**before["config"]["data"], "root": "elsewhere", "download": True}
    assert after["command"] == before["command"]


def test_resuming_with_another_config_names_the_key(whole: Path, tde: Tde) -> None:
    result = tde(*RECIPE, f"out={whole}", "resume=true", "train.lr=0.01", "head.tau=8")
    assert result.exit_code == 2 and "changed: head.tau, train.lr" in result.output


def test_resuming_and_overwriting_at_once_is_refused(whole: Path, tde: Tde) -> None:
    before = (whole / "deconfound/seed0" / checkpoint.FILE).stat().st_mtime_ns
    result = tde(*RECIPE, f"out={whole}", "overwrite=true", "resume=true")
    assert result.exit_code == 2
    assert result.stderr == "error: resume=true goes on and overwrite=true starts anew: give one of them\n"
    assert (whole / "deconfound/seed0" / checkpoint.FILE).stat().st_mtime_ns == before


def test_overwriting_starts_anew_but_spares_what_is_no_run(tmp_path: Path, tde: Tde) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    result = tde(*RECIPE, f"out={tmp_path}", "overwrite=true")
    assert result.exit_code == 2 and "is not a run" in result.output and (tmp_path / "thesis.tex").exists()
    run = tmp_path / "run"
    one = ["train", "digits_lt", *TINY, "train.epochs=1", "methods=[linear]", "seeds=[0]", f"out={run}"]
    assert tde(*one).exit_code == 0
    (run / "old").touch()
    assert tde(*one, "overwrite=true").exit_code == 0 and not (run / "old").exists()


class TestCheckpoint:
    """Loading what is missing, damaged, or of another network."""

    @pytest.fixture
    def cell(self, whole: Path, tmp_path: Path) -> Path:
        shutil.copytree(whole / "deconfound/seed0", tmp_path / "cell")
        return tmp_path / "cell"

    def test_it_holds_tensors_only(self, cell: Path) -> None:
        def leaves(node: Any) -> list[Any]:
            return [leaf for item in node.values() for leaf in leaves(item)] if isinstance(node, dict) else [node]

        content = torch.load(cell / checkpoint.FILE, weights_only=True)
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves(content))
        assert content["progress"]["epochs_done"] == 4 and content["network"]["head.num_updates"] == 4 * 6

    def test_missing(self, cell: Path) -> None:
        (cell / checkpoint.FILE).unlink()
        with pytest.raises(UserError, match="no checkpoint at"):
            checkpoint.load(cell, build_network(load_config("digits_lt", TINY), "deconfound", 1, 10))

    @pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other tensors"])
    def test_corrupt(self, cell: Path, damage: str) -> None:
        path = cell / checkpoint.FILE
        whole = path.read_bytes()
        if damage == "other tensors":
            torch.save({"weights": torch.zeros(3)}, path)
        else:
            path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint"}[damage])
        with pytest.raises(UserError, match=r"is corrupt|does not fit") as error:
            checkpoint.load(cell, build_network(load_config("digits_lt", TINY), "deconfound", 1, 10))
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    def test_of_another_network(self, cell: Path) -> None:
        other = build_network(load_config("digits_lt", [*TINY, "model.features=16"]), "deconfound", 1, 10)
        with pytest.raises(UserError, match="does not fit this run"):
            checkpoint.load(cell, other)
