"""The figures of a run of detectors, from what its trainings wrote."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torchvision.ops import box_convert

from tde_trainer.config import config_from
from tde_trainer.detection.annotations import Annotations, frequency_groups
from tde_trainer.detection.class_plot import class_plot
from tde_trainer.detection.detections import Detection, read_detections
from tde_trainer.detection.images import DetectionImages
from tde_trainer.detection.masks import decode
from tde_trainer.detection.pictures import Classes, Detections, Row, draw_detections
from tde_trainer.detection.reading import DETECTIONS
from tde_trainer.detection.schema import DetectionConfig
from tde_trainer.detection.sets import load_test
from tde_trainer.errors import UserError
from tde_trainer.files import read_json
from tde_trainer.kinds import PLAIN
from tde_trainer.plots import png, stack
from tde_trainer.results import Result

IMAGES = 4
SURE = 0.3  # score from which on a detection is drawn
CAPTIONS = {
    "ap_per_class": "AP of masks of every class against its training images, mean over seeds; lines are means over the "
    "rare, common and frequent classes.",
    "detections": f"What is detected with a score of {SURE:g} or more in the test images with the most objects of rare "
    "classes, without TDE and with.",
}


def draw_all(groups: dict[str, list[Result]]) -> tuple[dict[str, bytes], list[str]]:
    """Every figure by its name in `CAPTIONS`, and a line for each that is left out."""
    images: dict[str, bytes] = {}
    left_out = []
    for name, draw in (("ap_per_class", _ap_per_class), ("detections", _detections)):
        try:
            images[name] = draw(groups)
        except UserError as error:
            left_out.append(f"The figure {name} is left out: {error}")
    return images, left_out


def _ap_per_class(groups: dict[str, list[Result]]) -> bytes:
    first, *others = (cell.values for cells in groups.values() for cell in cells)
    if any(other[key] != first[key] for other in others for key in ("class_names", "class_counts")):
        raise UserError("the runs are of other training images")
    rows = {}
    for name, cells in groups.items():
        for mode, suffix in PLAIN.items():
            measured = [cell.values["accuracy"][mode] for cell in cells if cell.values["accuracy"][mode]]
            if measured:
                rows[name + suffix] = stack([accuracy["per_class"] for accuracy in measured]).mean(0).tolist()
    return png(class_plot(first["class_counts"], rows, first["class_names"]))


def _detections(groups: dict[str, list[Result]]) -> bytes:
    """By the first seed of the last method that has TDE, or else of the last one."""
    with_tde = [name for name, cells in groups.items() if cells[0].values["accuracy"]["with_tde"]]
    name = (with_tde or list(groups))[-1]
    cell = groups[name][0]
    config = config_from(cell.values["config"])
    assert isinstance(config, DetectionConfig)
    truth = load_test(config.data)
    frequencies = frequency_groups(torch.tensor(cell.values["class_counts"]))
    chosen = with_most_rare(truth, frequencies)
    images = DetectionImages(truth, Path(config.data.root), training=False)
    columns = {
        name + suffix: _found(cell.directory / DETECTIONS / f"{mode}.json", truth, chosen)
        for mode, suffix in PLAIN.items()
        if cell.values["accuracy"][mode]
    }
    rows = [
        Row(*images[index], {title: found[place] for title, found in columns.items()})
        for place, index in enumerate(chosen)
    ]
    return png(draw_detections(rows, Classes(cell.values["class_names"], frequencies), threshold=SURE))


def with_most_rare(truth: Annotations, frequencies: tuple[str, ...]) -> list[int]:
    """Places of the `IMAGES` images with the most objects of rare classes; of equal ones the first in the file.

    Args:
        truth: annotations of the images.
        frequencies: ``[C]``, r, c or f.
    """
    rare = [
        sum(frequencies[truth.labels[found.category_id] - 1] == "r" for found in truth.by_image[image.id])
        for image in truth.images
    ]
    return sorted(range(len(rare)), key=lambda index: -rare[index])[:IMAGES]


def _found(file: Path, truth: Annotations, chosen: Iterable[int]) -> list[Detections]:
    """What a submission holds of some of the images, as far as it is drawn."""
    by_image: dict[int, list[Detection]] = {truth.images[index].id: [] for index in chosen}
    entries = [entry for entry in read_json(file) if entry["image_id"] in by_image and entry["score"] >= SURE]
    for detection in read_detections(entries, truth):
        by_image[detection.image.id].append(detection)
    return [_as_tensors(found, truth) for found in by_image.values()]


def _as_tensors(found: list[Detection], truth: Annotations) -> Detections:
    boxes = torch.tensor([detection.box() for detection in found]).reshape(-1, 4)
    masks = {"masks": torch.stack([decode(detection.mask()) for detection in found])} if found else {}
    return {
        "boxes": box_convert(boxes, "xywh", "xyxy"),
        "labels": torch.tensor([truth.labels[detection.category_id] for detection in found], dtype=torch.int64),
        "scores": torch.tensor([detection.score for detection in found]),
        **masks,
    }
