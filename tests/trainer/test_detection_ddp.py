"""Detectors on two processes, by torchrun: one state on both, and one submission of all images."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from detection_ddp_job import RECORD
from tde_trainer.config import config_from
from tde_trainer.detection.images import RepeatFactorSampler, repeat_factors
from tde_trainer.detection.restore import reader_of
from tde_trainer.detection.schema import DetectionConfig
from tde_trainer.detection.sets import load_set
from tde_trainer.ranks import ON_CPU
from tde_trainer.results import finished_cells
from trainer_tools import TINY_DETECTOR, TORCHRUN

pytestmark = pytest.mark.skipif(not ON_CPU, reason="two processes would share the GPU, which NCCL refuses")

JOB = Path(__file__).with_name("detection_ddp_job.py")
TIMEOUT = 300.0  # seconds, for a machine that has other things to do: a hang takes for ever
BATCH, THRESHOLD = 4, 0.05  # of which an image is left over for the last batch


@dataclass(frozen=True)
class Launched:
    """What came of one cell: its folder, and what both ranks saw."""

    cell: Path
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def launched(tiny_shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("ddp")
    changes = ["methods=[deconfound]", f"train.batch_size={BATCH}", f"train.repeat_threshold={THRESHOLD}"]
    where = [f"data.root={tiny_shapes}", f"out={folder / 'run'}"]
    (folder / "arguments.json").write_text(json.dumps(["train", "shapes_lvis", *TINY_DETECTOR, *changes, *where]))
    command = [*TORCHRUN, "2", str(JOB), str(folder)]
    ended = subprocess.run(command, timeout=TIMEOUT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    ranks = [json.loads((folder / RECORD.format(rank=rank)).read_text()) for rank in (0, 1)]
    assert [rank["exit_code"] for rank in ranks] == [0, 0], ranks[0]["output"]
    return Launched(folder / "run/deconfound/seed0", ranks)


def test_both_hold_the_same_weights_and_directions(launched: Launched) -> None:
    first, second = launched.ranks
    assert first["directions"] == second["directions"] and len(first["directions"]) == 3
    assert all(any(direction) and all(map(math.isfinite, direction)) for direction in first["directions"])
    assert first["weights"] == second["weights"]


def test_a_last_batch_too_small_for_both_is_no_trouble(launched: Launched, tiny_shapes: Path) -> None:
    config = config_from(json.loads((launched.cell / "results.json").read_text())["config"])
    assert isinstance(config, DetectionConfig)
    sampler = RepeatFactorSampler(repeat_factors(load_set(config.data).train, THRESHOLD), 0)
    assert len(sampler) % BATCH == 1
    (row,) = [json.loads(line) for line in (launched.cell / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(row["loss"])


def test_both_measure_the_same(launched: Launched) -> None:
    # NaN is not equal to itself, but its text is
    first, second = (json.dumps(rank["measured"]) for rank in launched.ranks)
    assert first == second
    assert launched.ranks[0]["measured"]["alpha"]["value"] in (0.5, 1.5)


def test_one_submission_holds_every_image_once(launched: Launched) -> None:
    (cell,) = finished_cells(launched.cell)
    config = config_from(cell.values["config"])
    assert isinstance(config, DetectionConfig)
    data = load_set(config.data)
    found_alone = list(reader_of(cell, config, data).in_every_way(cell.values["alpha"]["value"]))
    for mode, alone in found_alone:
        found = json.loads((launched.cell / f"detections/{mode}.json").read_text())
        images = [image for image, _ in groupby(found, key=lambda entry: entry["image_id"])]
        assert sorted(images) == sorted(image.id for image in data.test.images)
        # What one process finds by itself, in another order
        assert sorted(found, key=lambda entry: images.index(entry["image_id"])) == sorted(
            alone, key=lambda entry: images.index(entry["image_id"])
        )


def test_only_the_main_process_speaks(launched: Launched) -> None:
    first, second = (rank["output"] for rank in launched.ranks)
    assert "deconfound seed 0: AP " in first and second == ""
