"""Whatever moment a trainer is killed at, it ends in the bits of one that was not.

A short form of it; `make kill-test` kills each of the trainings 50 times.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from killed import RUN, kill_until, left, train
from torchvision.transforms.v2.functional import to_pil_image
from trainer_tools import TINY, TINY_DETECTOR

KILLS = int(os.environ.get("TDE_KILLS", 0))  # of each training; 0: the short form
SHORT = {"classifiers": 3, "workers": 2}
SEED = int(os.environ.get("TDE_KILL_SEED", 0))

Job = Callable[[Path], list[str]]


def classifiers(folder: Path) -> list[str]:
    """Two, one of which draws images of its own."""
    return ["train", "digits_lt", *TINY, "train.epochs=8", "methods=[deconfound,bbn]", "seeds=[0]"]


def second_stage(folder: Path) -> list[str]:
    """Of a first that is there."""
    train(["train", "digits_lt", *TINY, "methods=[linear]", "seeds=[0]"], folder)
    return ["train", "digits_lt", *TINY, "methods=[crt,tau_norm,oltr]", "seeds=[0]", f"from={folder / RUN}"]


def workers(folder: Path) -> list[str]:
    """Images read, cropped and coloured by two processes."""
    generator = torch.Generator().manual_seed(0)
    for split, counts in {"train": [20, 8, 4], "val": [4, 4, 4], "test": [6, 6, 6]}.items():
        lines = []
        for label in torch.arange(3).repeat_interleave(torch.tensor(counts)).tolist():
            file = folder / split / f"{len(lines)}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(torch.randint(256, (3, 12, 10), dtype=torch.uint8, generator=generator)).save(file)
            lines.append(f"{split}/{file.name} {label}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    data = ["data.name=list_lt", f"data.root={folder}", "data.image_size=8", "data.workers=2"]
    return ["train", "digits_lt", *TINY, *data, "train.epochs=6", "train.batch_size=8", "methods=[cosine]", "seeds=[0]"]


def detectors(folder: Path) -> list[str]:
    """With images that are drawn first."""
    data = ["data.name=shapes_lvis", f"data.root={folder}", "data.train_images=24"]
    return ["train", "shapes_lvis", *TINY_DETECTOR, *data, "train.epochs=3", "methods=[deconfound]"]


def many_classes(folder: Path) -> list[str]:
    """Without checkpoints: begun again from the start."""
    data = ["data.classes=1001", "data.train_samples=512", "data.test_samples=128"]
    return ["train", "million_lt", *data, "train.batch_size=64", "train.epochs=3", "train.threads=1"]


@pytest.mark.parametrize(
    "job", [classifiers, second_stage, workers, detectors, many_classes], ids=lambda job: job.__name__
)
def test_a_killed_trainer_ends_in_the_same_bits(job: Job, tmp_path: Path) -> None:
    kills = KILLS or SHORT.get(job.__name__, 0)
    if not kills:
        pytest.skip("in the long form, `make kill-test`")
    arguments = job(tmp_path / "given")
    seconds = train(arguments, tmp_path / "whole")
    print(f"{job.__name__}: {seconds:.1f} s undisturbed, kills of seed {SEED}")
    outcome = kill_until(kills, arguments, tmp_path / "killed", seconds, random.Random(SEED))
    print(
        f"{job.__name__}: {outcome.kills} kills, {outcome.while_writing} of them while a file was written, "
        f"{len(outcome.finished)} trainings finished"
    )
    wanted = left(tmp_path / "whole" / RUN)
    assert [folder for folder in outcome.finished if left(folder / RUN) != wanted] == []
