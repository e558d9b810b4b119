"""From trained networks to their figure: which networks, which images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tde_trainer import results
from tde_trainer.data.longtail import SHOTS, shot_masks
from tde_trainer.errors import UserError
from tde_trainer.files import write_atomic
from tde_trainer.gradcam.figure import Shown, draw_maps
from tde_trainer.gradcam.maps import ActivationMaps, Classifier, activation_maps
from tde_trainer.results import Result
from tde_trainer.trained import TrainedCell

SEED = 0


@dataclass(frozen=True)
class Choice:
    """Some test images, and how they were chosen."""

    index: Tensor  # [N] int64
    how: str


def draw_gradcam(paths: Sequence[Path], count: int, out: Path) -> str:
    """Write the activation maps of trained networks on the same test images, as a PNG.

    Args:
        paths: runs, of which every method's first seed is shown, or single trainings.
        count: how many images at most.
        out: the PNG.

    Returns:
        The figure's caption.

    Raises:
        UserError: a path is no run, the networks have different test images, or one has no maps.
    """
    if count < 1:
        raise UserError(f"--images must be at least 1, got {count}")
    cells = cells_of(paths)
    for cell in cells[1:]:
        if not torch.equal(cell.data.test.labels, cells[0].data.test.labels):
            raise _other_images(cell, cells[0])
    chosen = choose(cells, count)
    data = cells[0].data
    images, labels = data.test[chosen.index]
    columns: dict[str, ActivationMaps] = {}
    for name, cell in zip(_names(cells), cells, strict=True):
        shown, _ = cell.data.test[chosen.index]
        if not torch.equal(shown, images):
            raise _other_images(cell, cells[0])
        columns |= _maps(name, cell, shown)
    caption = f"Grad-CAM for the class that each network predicts, every map scaled to its own range. {chosen.how}"
    write_atomic(out, draw_maps(Shown(images, labels.tolist(), data.class_names, columns, caption)))
    return caption


def cells_of(paths: Sequence[Path]) -> list[TrainedCell]:
    """The first finished seed of every method of each run; or a single training, given its own folder."""
    cells: list[TrainedCell] = []
    for path in paths:
        first: dict[str, Result] = {}
        for result in results.finished_cells(path):
            first.setdefault(result.method, result)
        cells += map(TrainedCell, first.values())
    for cell in cells[1:]:
        # Reading a tree of images takes most of the time.
        if (cell.config.data, cell.result.values["seed"]) == (cells[0].config.data, cells[0].result.values["seed"]):
            cell.data = cells[0].data
    return cells


def choose(cells: Sequence[TrainedCell], count: int) -> Choice:
    """Test images of the classes with the fewest training images, at random among those on which TDE has a say.

    Few-shot classes, or medium-shot ones where there are no few-shot ones. "A say" is another prediction of at least
    one network; where there is no such image, any will do.
    """
    labels = cells[0].data.test.labels
    masks = shot_masks(cells[0].class_counts.cpu())
    group = [name for name in SHOTS if masks[name].any()][-1]
    of_group = masks[group][labels]
    changed = torch.zeros_like(of_group)
    for cell in cells:
        if (alpha := alpha_of(cell)) is not None:
            with_tde, without = cell.head.alpha_sweep(cell.features("test").x, [alpha, 0.0])
            changed |= (with_tde != without).cpu()
    matter = bool((of_group & changed).any())
    candidates = (of_group & changed if matter else of_group).nonzero().flatten()
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(SEED))
    index = candidates[order[:count]].sort().values
    which = " on which TDE changes the prediction" if matter else ""
    return Choice(
        index,
        f"Images: {len(index)} of the {len(candidates)} test images of {group}-shot classes{which}, "
        f"drawn at random with seed {SEED}.",
    )


def alpha_of(cell: TrainedCell) -> float | None:
    """The strength of TDE that its accuracy was reported at; None for a method without."""
    alpha = cell.result.values["alpha"]
    return alpha and float(alpha["value"])


def _maps(name: str, cell: TrainedCell, images: Tensor) -> dict[str, ActivationMaps]:
    pixels = cell.data.pipeline(images.to(cell.device), training=False)
    strengths = {name: 0.0}
    if (alpha := alpha_of(cell)) is not None:
        strengths[f"{name} + TDE"] = alpha
    return {title: activation_maps(Classifier(cell.network, alpha), pixels) for title, alpha in strengths.items()}


def _other_images(cell: TrainedCell, first: TrainedCell) -> UserError:
    return UserError(
        f"{cell.result.directory} was tested on other images than {first.result.directory}; wanted are runs of "
        "the same data, image size and test split"
    )


def _names(cells: Sequence[TrainedCell]) -> list[str]:
    """The methods', or with their folders where two are the same."""
    methods = [cell.result.method for cell in cells]
    if len(set(methods)) == len(methods):
        return methods
    return [str(cell.result.directory) for cell in cells]
