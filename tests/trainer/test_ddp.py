"""Two processes on the CPU, by torchrun: the same training as one, the same state on both, and failing together."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ddp_job import KILLED, RECORD, REPORTED, Recorder, plain_digits
from tde_trainer import checkpoint
from tde_trainer.config import load_config
from tde_trainer.methods import Batch, Stage
from tde_trainer.network import Network
from tde_trainer.progress import Reporter
from tde_trainer.ranks import ON_CPU
from torch import Tensor
from trainer_tools import TORCHRUN, Tde

pytestmark = pytest.mark.skipif(not ON_CPU, reason="two processes would share the GPU, which NCCL refuses")

JOB = Path(__file__).with_name("ddp_job.py")
TIMEOUT = 150.0  # seconds, for a machine that has other things to do: a hang takes for ever
PROMPT = 30.0  # seconds in which a job ends that has lost a process
EPOCHS, STEPS = 3, 6
# 384 training images, which are 6 batches; 60 images for validation and 400 for testing, which are no whole batches.
DATA = ["data.name=plain_digits", "data.val_per_class=6", "data.ratio=33", "model.name=plain", "model.features=8"]
TRAINING = ["train.batch_size=64", f"train.epochs={EPOCHS}", "train.warmup_epochs=1", "head.alpha_steps=7", "seeds=[0]"]
RECIPE = ["train", "digits_lt", *DATA, *TRAINING]
ALL, ONE = "methods=[deconfound,class_balanced,bbn]", "method=deconfound"
STAGE_TWO = ["methods=[tau_norm,crt]", "stage_two.epochs=2"]
GRID = ["head.tau=8,16", "train.epochs=1", "train.batch_size=100"]
ERRORS = {
    "in use": "is not empty: resume=true",
    "not divided": "train.batch_size=33 is the batch of all processes together: it must be a multiple of",
    "unknown": "unknown key 'train.rate'",
    "diverged": "the loss is nan in epoch 1",
    "unwritable": "cannot write",
}
# A step sums over its batch in another order, which moves a figure by about one rounding; measured after all steps: 2.
ROUNDING = EPOCHS * STEPS * float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Launched:
    """What came of one process, and of the jobs of two."""

    folder: Path
    one: dict[str, Any]  # what the only process saw; see `Recorder`
    ranks: list[dict[str, Any]]  # what both did, by the name of the job
    exit_code: int
    seconds_to_end: float  # from the death of a process to the end of the job

    def curve(self, run: str, method: str = "deconfound") -> list[float]:
        """The losses of all epochs."""
        lines = (self.folder / run / method / "seed0/metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def network(self, run: str) -> dict[str, Tensor]:
        """The weights and buffers of the de-confounded network."""
        state: dict[str, Tensor] = torch.load(self.folder / run / "deconfound/seed0" / checkpoint.FILE)["network"]
        return state

    def seen(self, what: str, method: str = "Normalised") -> list[Any]:
        """What each rank saw of the first job."""
        return [rank[REPORTED]["seen"][method][what] for rank in self.ranks]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory, tde: Tde) -> Iterator[Launched]:
    """All that takes time, once: importing torch in three processes."""
    folder = tmp_path_factory.mktemp("ddp")
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        assert tde(*RECIPE, ALL, f"out={folder / 'one'}").exit_code == 0
        one = deepcopy(recorder.seen)  # it goes on recording
        with pytest.MonkeyPatch.context() as interruption:
            interruption.setattr(Reporter, "epoch_done", _interrupt)
            assert tde(*RECIPE, ONE, f"out={folder / 'begun by one'}").exit_code == 130
        blocked = folder / "blocked"
        blocked.mkdir()
        (blocked / "run.json").write_bytes((folder / "one/run.json").read_bytes())
        (blocked / "deconfound").touch()  # where the main process wants to make a folder
        jobs = {
            REPORTED: [*RECIPE, ALL, f"out={folder / 'two'}"],
            "resumed": [*RECIPE, ONE, f"out={folder / 'begun by one'}", "resume=true"],
            "stage two": [*RECIPE, *STAGE_TWO, f"from={folder / 'one/class_balanced'}", f"out={folder / 'stage two'}"],
            "grid": ["grid", *RECIPE[1:], *GRID, f"out={folder / 'grid'}"],
            "in use": [*RECIPE, ALL, f"out={folder / 'one'}"],
            "not divided": [*RECIPE, "train.batch_size=33", f"out={folder / 'none'}"],
            "unknown": [*RECIPE, "train.rate=1"],
            "diverged": [*RECIPE, "method=linear", "train.lr=1e30", f"out={folder / 'diverged'}"],
            "unwritable": [*RECIPE, ALL, f"out={blocked}", "resume=true"],
            KILLED: [*RECIPE, ONE, f"out={folder / 'begun by two'}"],
        }
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [*TORCHRUN, "2", str(JOB), str(folder)]
        ended = subprocess.run(command, timeout=TIMEOUT, capture_output=True, text=True, check=False)
        assert (folder / KILLED).exists(), ended.stderr
        seconds = time.time() - float((folder / KILLED).read_text())
        ranks = [json.loads((folder / RECORD.format(rank=rank)).read_text()) for rank in (0, 1)]
        yield Launched(folder, one, ranks, ended.returncode, seconds)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def assert_close(ours: Any, theirs: Any) -> None:
    """To rounding, relative to the norm of each row."""
    ours, theirs = np.atleast_2d(ours), np.atleast_2d(theirs)
    assert ours.shape == theirs.shape
    assert (np.linalg.norm(ours - theirs, axis=-1) <= ROUNDING * np.linalg.norm(theirs, axis=-1)).all()


def assert_same_curve(ours: list[float], theirs: list[float]) -> None:
    """Every loss to rounding."""
    assert_close(np.array(ours)[:, None], np.array(theirs)[:, None])


def test_two_processes_train_as_one(launched: Launched) -> None:
    assert [rank[REPORTED]["exit_code"] for rank in launched.ranks] == [0, 0]
    one, two = launched.curve("one"), launched.curve("two")
    assert len(two) == EPOCHS and one[-1] < one[0] / 2
    assert_same_curve(two, one)
    ours, theirs = launched.network("two"), launched.network("one")
    assert ours.keys() == theirs.keys() and ours["head.num_updates"] == theirs["head.num_updates"] == EPOCHS * STEPS
    for name in theirs:
        assert_close(ours[name].flatten().numpy(), theirs[name].flatten().numpy())


def test_the_moving_average_is_the_same_on_both(launched: Launched) -> None:
    first, second = launched.seen("ema")
    assert first == second and len(first) == EPOCHS
    assert_close(first, launched.one["Normalised"]["ema"])


def test_both_see_every_test_image_once(launched: Launched) -> None:
    data = plain_digits(load_config("digits_lt", DATA[1:3]).data, 0)
    assert len(data.test) % 64 and len(data.val) % 64
    assert launched.seen("classes") == [[data.test.labels.tolist()]] * 2
    first, second = launched.seen("features")
    assert first == second
    assert_close(first[0], launched.one["Normalised"]["features"][0])
    assert launched.seen("predicted") == [launched.one["Normalised"]["predicted"]] * 2


def test_only_the_main_process_speaks(launched: Launched) -> None:
    first, second = (rank[REPORTED]["output"] for rank in launched.ranks)
    assert "deconfound seed 0: overall" in first and "report: " in first and second == ""
    assert (launched.folder / "two/report.html").exists()


def test_ranks_draw_other_images_in_every_epoch(launched: Launched) -> None:
    drawn = [tuple(classes) for rank in launched.seen("drawn", "BBN") for classes in rank]
    assert len(drawn) == 2 * EPOCHS * STEPS == len(set(drawn)) and {len(classes) for classes in drawn} == {32}


def test_weights_of_classes_are_normalised_on_each(
    launched: Launched, tde: Tde, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Network.forward

    def of_two(network: Network, batch: Batch | Tensor, stage: Stage | None = None) -> Tensor:
        if isinstance(batch, Tensor):
            return forward(network, batch)
        halves = zip(batch.images.chunk(2), batch.target.chunk(2), strict=True)
        return torch.stack([forward(network, Batch(*half), stage) for half in halves]).mean()

    monkeypatch.setattr(Network, "forward", of_two)
    assert tde(*RECIPE, "method=class_balanced", f"out={launched.folder / 'halves'}").exit_code == 0
    two, halves, one = (launched.curve(run, "class_balanced") for run in ("two", "halves", "one"))
    assert_same_curve(two, halves)
    assert all(abs(ours - theirs) > 10 * ROUNDING * theirs for ours, theirs in zip(two, one, strict=True))


def test_two_go_on_where_one_stopped(launched: Launched) -> None:
    assert [rank["resumed"]["exit_code"] for rank in launched.ranks] == [0, 0]
    assert_same_curve(launched.curve("begun by one"), launched.curve("one"))


def test_a_killed_process_ends_the_job_and_one_goes_on(launched: Launched, tde: Tde) -> None:
    assert launched.exit_code != 0 and launched.seconds_to_end < PROMPT
    assert len(launched.curve("begun by two")) == 1
    assert tde(*RECIPE, ONE, f"out={launched.folder / 'begun by two'}", "resume=true").exit_code == 0
    assert_same_curve(launched.curve("begun by two"), launched.curve("one"))


def test_a_second_stage(launched: Launched, tde: Tde) -> None:
    out = launched.folder / "stage two of one"
    assert tde(*RECIPE, *STAGE_TWO, f"from={launched.folder / 'one/class_balanced'}", f"out={out}").exit_code == 0
    assert [rank["stage two"]["exit_code"] for rank in launched.ranks] == [0, 0]
    assert_close(
        np.array(launched.curve("stage two", "crt"))[:, None], np.array(launched.curve(out.name, "crt"))[:, None]
    )
    chosen = [
        json.loads((launched.folder / run / "tau_norm/seed0/results.json").read_text())["stage_two"]["val"]
        for run in ("stage two", out.name)
    ]
    assert chosen[0] == chosen[1]


def test_a_grid(launched: Launched) -> None:
    assert [rank["grid"]["exit_code"] for rank in launched.ranks] == [0, 0]
    rows = json.loads((launched.folder / "grid/grid.json").read_text())["rows"]
    assert len(rows) == 2 * (1 + 3)  # without TDE, and at three alphas
    # 384 images by 100: the last batch is a smaller one, and there are as many steps as in one process.
    assert launched.network("grid/head.tau=8")["head.num_updates"] == 4


@pytest.mark.parametrize("job", ERRORS)
def test_an_error_ends_both_with_one_line(launched: Launched, job: str) -> None:
    main, other = (rank[job] for rank in launched.ranks)
    assert main["exit_code"] == 2 and ERRORS[job] in main["output"]
    said = [line for line in main["output"].splitlines() if not line.startswith("plain_digits, training images")]
    assert len(said) == 1 and said[0].startswith("error: ")
    assert other == {"exit_code": 0, "output": "", "seen": other["seen"]}
