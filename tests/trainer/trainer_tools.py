"""Shared by the trainer's tests."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tde_trainer.methods import METHODS
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2.functional import to_pil_image
from typer.testing import Result

# Each start on a port of its own, as several tests may be at it
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
TINY = ["train.epochs=2", "model.width=4", "model.features=8", "data.val_per_class=5", "head.alpha_steps=7"]

# A detector for `tiny_shapes`, of which no more is wanted than that it is trained and evaluated in seconds
TINY_DETECTOR = [
    *("data.name=lvis", "data.min_size=48", "data.max_size=48", "train.epochs=1", "head.alphas=[0.5,1.5]"),
    *("model.representation=32", "model.proposals=20", "model.box_batch=8", "model.detections=10"),
]

NORMALISED = {"cosine", "capsule", "deconfound"}  # the methods that have TDE
SECOND_STAGE = ("joint", "ncm", "crt", "tau_norm", "lws", "oltr", "decouple_oltr")
FIRST_STAGE = tuple(name for name in METHODS if name not in SECOND_STAGE)

Tde = Callable[..., Result]


class Payload:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.file,)


def marked(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Images ``[N, 3, H, W]`` uint8 of one colour each, which says class and place: what `marks` reads."""
    place = torch.arange(len(labels))
    colours = torch.stack([labels, place // 256, place % 256], 1).to(torch.uint8)
    return colours[:, :, None, None].expand(-1, -1, *size).contiguous()


def marks(images: Tensor) -> list[tuple[int, int]]:
    """The class and the place of every image."""
    return [(label, 256 * high + low) for label, high, low in images[:, :, 0, 0].tolist()]


def image_tree(
    root: Path, splits: dict[str, Sequence[int]], size: tuple[int, int] = (8, 8), suffix: str = "png"
) -> Path:
    """An ImageFolder tree of `marked` images, ``splits[name][c]`` of them in the folder of class c."""
    for split, counts in splits.items():
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        for place, image in enumerate(marked(labels, size)):
            file = root / split / f"class{labels[place]:02}" / f"{place:04}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(file)
    return root


def cifar_labels(num_classes: int, per_class: int) -> Tensor:
    """In the order in which `cifar_files` has them: mixed, as in the real ones."""
    generator = torch.Generator().manual_seed(num_classes)
    return torch.arange(num_classes).repeat(per_class)[torch.randperm(num_classes * per_class, generator=generator)]


def cifar_files(
    root: Path, dataset: type[CIFAR10], train: Tensor, test: Tensor, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """`marked` images of these labels in the files that torchvision reads, whose check sums it then lets pass."""
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    for listed, labels in (("train_list", train), ("test_list", test)):
        files = [name for name, _ in getattr(dataset, listed)]
        rows = marked(labels, (32, 32)).flatten(1).numpy()
        key = "labels" if dataset is CIFAR10 else "fine_labels"
        for name, part, targets in zip(files, *(np.array_split(a, len(files)) for a in (rows, labels)), strict=True):
            (folder / name).write_bytes(pickle.dumps({"data": part, key: targets.tolist()}))
        monkeypatch.setattr(dataset, listed, [[name, None] for name in files])
    names = [f"class{label:02}" for label in range(int(train.max()) + 1)]
    (folder / dataset.meta["filename"]).write_bytes(pickle.dumps({dataset.meta["key"]: names}))
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": None})
    return root


def published_selection(labels: Tensor, counts: Iterable[int]) -> list[int]:
    """What the public code of CIFAR-LT keeps: numpy seeded once with 0, every class shuffled in turn and cut."""
    np.random.seed(0)
    kept: list[int] = []
    for label, count in enumerate(counts):
        members = np.where(labels.numpy() == label)[0]
        np.random.shuffle(members)
        kept += members[:count].tolist()
    return kept
