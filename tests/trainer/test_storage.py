"""Disks that are full or read-only, folders with two trainers, checkpoints that are damaged or another's: one line says
so, the last good state is untouched, and once the cause is gone the training ends in the bits of an undisturbed one."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tde_trainer import checkpoint
from tde_trainer.errors import UserError
from tde_trainer.ownership import owned
from tde_trainer.progress import Reporter
from trainer_tools import TINY, Payload, Tde

TRAIN = ["train", "digits_lt", *TINY, "train.epochs=3", "methods=[deconfound]"]
CELL = "deconfound/seed0"


def refusal(result: Any) -> str:
    """The line that a command ends with, whose exit code is that of the user's errors."""
    assert result.exit_code == 2, (result.output, result.exception)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def network(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(run / CELL / checkpoint.FILE, weights_only=True)["network"]
    return found


def trained(tde: Tde, run: Path, *changes: str) -> Path:
    result = tde(*TRAIN, "seeds=[0]", *changes, f"out={run}")
    assert result.exit_code == 0, result.output
    return run


@pytest.fixture(scope="module", autouse=True)
def no_reports() -> Iterator[None]:
    """Their plots take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tde_trainer.run.write_report", lambda runs, path: {})
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tde: Tde) -> Path:
    """An undisturbed run."""
    return trained(tde, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, tde: Tde) -> Path:
    """One that stopped after the first of its three epochs."""
    run = tmp_path_factory.mktemp("interrupted") / "run"

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "epoch_done", stop)
        assert tde(*TRAIN, "seeds=[0]", f"out={run}").exit_code == 130
    return run


@pytest.fixture
def run(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def resumed(tde: Tde, run: Path) -> Any:
    return tde(*TRAIN, "seeds=[0]", f"out={run}", "resume=true")


def assert_ends_as(whole: Path, run: Path, tde: Tde) -> None:
    assert resumed(tde, run).exit_code == 0
    ours, theirs = network(run), network(whole)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert {path.relative_to(run) for path in run.rglob("*")} == {path.relative_to(whole) for path in whole.rglob("*")}


def mounted(folder: Path, *options: str) -> None:
    done = subprocess.run(["mount", *options, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted(folder, "-t", "tmpfs", "-o", "size=2m", "tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


class TestFileSystems:
    """Real ones, where the tests may mount any; test_files.py and test_resume.py feign them everywhere."""

    def test_a_full_disk(self, interrupted: Path, whole: Path, disk: Path, tde: Tde) -> None:
        run = Path(shutil.copytree(interrupted, disk / "run"))
        before = (run / CELL / checkpoint.FILE).read_bytes()
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space left"), open(filler, "wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        said = refusal(resumed(tde, run))
        assert said.endswith(": No space left on device") and f"cannot write {run}" in said
        assert (run / CELL / checkpoint.FILE).read_bytes() == before
        filler.unlink()
        assert_ends_as(whole, run, tde)

    def test_a_read_only_folder(self, run: Path, whole: Path, tde: Tde) -> None:
        mounted(run, "--bind", str(run))
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", run], check=True)
            said = refusal(resumed(tde, run))
            assert said == f"error: cannot write {run / 'run.json'}: Read-only file system"
        finally:
            subprocess.run(["umount", "--lazy", run], check=True)
        assert_ends_as(whole, run, tde)


class TestOwners:
    """One at a time."""

    def test_a_second_trainer_is_refused_and_the_first_not_disturbed(self, run: Path, whole: Path, tde: Tde) -> None:
        with owned(run):
            before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
            assert refusal(resumed(tde, run)) == f"error: {run} is in use: another process is training there"
            assert refusal(tde(*TRAIN, f"out={run}", "overwrite=true")).endswith("another process is training there")
            assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        assert_ends_as(whole, run, tde)

    def test_what_a_process_forks_does_not_own_on_its_behalf(self, tmp_path: Path) -> None:
        begun, over = os.pipe(), os.pipe()
        with owned(tmp_path):
            worker = os.fork()
            if not worker:
                os.write(begun[1], b"!")
                os.read(over[0], 1)
                os._exit(0)
            os.read(begun[0], 1)
        try:
            with owned(tmp_path):
                pass
        finally:
            os.write(over[1], b"!")
            os.waitpid(worker, 0)

    def test_only_one_owner_even_within_a_process(self, tmp_path: Path) -> None:
        with owned(tmp_path), pytest.raises(UserError, match="is in use"), owned(tmp_path):
            pass


class TestLeftovers:
    """What a killed trainer leaves, at the worst moments."""

    def test_half_of_the_first_file(self, tmp_path: Path, whole: Path, tde: Tde) -> None:
        run = tmp_path / "run"
        run.mkdir()
        (run / ".run.json.0123abcd.partial").write_text('{"conf')
        assert_ends_as(whole, run, tde)

    def test_half_of_a_checkpoint(self, run: Path, whole: Path, tde: Tde) -> None:
        (run / CELL / ".checkpoint.pt.0123abcd.partial").write_bytes(b"half")
        assert_ends_as(whole, run, tde)

    def test_half_of_what_is_overwritten(
        self, run: Path, whole: Path, tde: Tde, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def killed(*arguments: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", killed)
            assert tde(*TRAIN, "seeds=[0]", f"out={run}", "overwrite=true").exit_code == 130
        assert (run / "run.json").exists()
        assert tde(*TRAIN, "seeds=[0]", f"out={run}", "overwrite=true").exit_code == 0

    def test_a_linked_folder_is_emptied_and_what_it_links_to_spared(self, run: Path, tmp_path: Path, tde: Tde) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere/kept").touch()
        (run / "link").symlink_to(tmp_path / "elsewhere")
        linked = tmp_path / "linked"
        linked.symlink_to(run)
        assert tde(*TRAIN, "seeds=[0]", f"out={linked}", "overwrite=true").exit_code == 0
        assert not (run / "link").exists() and (tmp_path / "elsewhere/kept").exists() and linked.is_symlink()

    def test_a_link_to_nowhere(self, tmp_path: Path, tde: Tde) -> None:
        (tmp_path / "run").symlink_to(tmp_path / "nowhere")
        assert f"cannot make {tmp_path / 'run'}" in refusal(tde(*TRAIN, f"out={tmp_path / 'run'}"))


def flipped(content: bytes) -> bytes:
    """One bit of a tensor is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def with_payload(content: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save({**torch.load(io.BytesIO(content), weights_only=True), "network": Payload(Path("ran"))}, buffer)
    return buffer.getvalue()


def of_tomorrow(content: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save({**torch.load(io.BytesIO(content), weights_only=True), "format": torch.tensor(99)}, buffer)
    return buffer.getvalue()


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda content: content[: len(content) // 2], "is corrupt"),
    "empty": (lambda content: b"", "is corrupt"),
    "no checkpoint": (lambda content: b"thesis", "is corrupt"),
    "a bit": (flipped, "is corrupt: the check sum of "),
    "a pickle": (with_payload, "is corrupt: Weights only load failed"),
    "a newer version": (of_tomorrow, "is of a newer version: its format is 99, known is 1"),
}
FOREIGN = {
    "head.num_heads": ["head.num_heads=4"],
    "head.tau": ["head.tau=8"],
    "method": ["methods=[cosine]"],
    "model.width": ["model.width=8"],
    "seed": ["seeds=[1]"],
}


class TestCheckpoints:
    """Found in a run's folder."""

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_a_damaged_one_is_refused_and_left_alone(
        self, damage: str, run: Path, tde: Tde, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        path = run / CELL / checkpoint.FILE
        damaged = DAMAGE[damage][0](path.read_bytes())
        path.write_bytes(damaged)
        said = refusal(resumed(tde, run))
        assert str(path) in said and DAMAGE[damage][1] in said
        assert path.read_bytes() == damaged and not (tmp_path / "ran").exists()

    def test_once_it_is_back_the_training_goes_on(self, run: Path, whole: Path, tde: Tde) -> None:
        path = run / CELL / checkpoint.FILE
        good = path.read_bytes()
        path.write_bytes(flipped(good))
        refusal(resumed(tde, run))
        path.write_bytes(good)
        assert_ends_as(whole, run, tde)

    @pytest.mark.parametrize("key", FOREIGN)
    def test_another_trainings_is_named_by_what_differs(
        self, key: str, run: Path, whole: Path, tmp_path: Path, tde: Tde
    ) -> None:
        other = tmp_path / "other"
        assert tde(*TRAIN, "seeds=[0]", "train.epochs=1", *FOREIGN[key], f"out={other}").exit_code == 0
        (theirs,) = other.rglob(checkpoint.FILE)
        finished = Path(shutil.copytree(whole, tmp_path / "finished"))
        for place, command in ((run, lambda: resumed(tde, run)), (finished, lambda: tde("eval", finished))):
            shutil.copy(theirs, place / CELL)
            said = refusal(command())
            assert f"{place / CELL / checkpoint.FILE} is of another training: what differs is " in said
            assert key in said.partition("what differs is ")[2].split(", ")

    def test_an_earlier_versions_is_taken_without_its_origin(self, run: Path, whole: Path, tde: Tde) -> None:
        path = run / CELL / checkpoint.FILE
        content = torch.load(path, weights_only=True)
        torch.save({key: value for key, value in content.items() if key not in ("format", "origin")}, path)
        assert_ends_as(whole, run, tde)

    @pytest.mark.parametrize("damage", ["lost", "a line less", "damaged"])
    def test_its_metrics_must_be_there(self, damage: str, run: Path, tde: Tde) -> None:
        path = run / CELL / "metrics.jsonl"
        if damage == "lost":
            path.unlink()
        else:
            path.write_text({"a line less": "", "damaged": '{"epoch": 1, "lo'}[damage])
        assert str(path) in refusal(resumed(tde, run))

    def test_a_run_of_before_a_key_came_is_resumed(self, run: Path, whole: Path, tde: Tde) -> None:
        settings = run / "run.json"
        text = settings.read_text()
        assert '"skip_corrupt": false,' in text
        settings.write_text(text.replace('"skip_corrupt": false,', ""))
        assert_ends_as(whole, run, tde)
