"""LVIS's average precision, equal to that of the official package ``lvis``.

LVIS is federated: of each image only some classes are judged, those with an object in it and those that it is known
not to show; detections of other classes count neither way, and where objects of a class may have been left unmarked, a
detection without an object does not either. An object counts with the area of its mask, also among boxes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from tde_trainer.detection.annotations import FREQUENCIES, Annotation, Annotations, Image, read_annotations
from tde_trainer.detection.detections import MOST, Detection, best, read_detections
from tde_trainer.detection.masks import run_lengths
from tde_trainer.errors import UserError, unknown

KINDS = ("bbox", "segm")

Detections = Path | str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Score:
    """How well objects were found, by class; NaN where a class has no object.

    Attributes:
        precision: ``[10, 101, C, 4]`` float64: at IoU 0.5, 0.55 .. 0.95; at recall 0, 0.01 .. 1; of classes in the
            order of the categories; of objects of any area, below 32², to 96², and above.
        recall: ``[10, C, 4]`` float64, at most 300 detections an image.
        frequencies: r, c or f of each class.
    """

    precision: Tensor
    recall: Tensor
    frequencies: tuple[str, ...]

    def per_class(self) -> Tensor:
        """AP of each class, ``[C]`` float64 in 0 .. 1."""
        return self.precision[..., 0].mean((0, 1))

    def measures(self) -> dict[str, float]:
        """LVIS's measures in 0 .. 1, means over the classes that have them; NaN where no class has one.

        AP over IoU 0.5 .. 0.95, AP50 and AP75 at one; AP_s, AP_m and AP_l of small, medium and large objects; AP_r,
        AP_c and AP_f of rare, common and frequent classes; AR.
        """
        precision = self.precision[..., 0]
        found = {"AP": precision, "AP50": precision[0], "AP75": precision[5]}
        found |= {f"AP_{size}": self.precision[..., place] for place, size in enumerate("sml", 1)}
        for group in FREQUENCIES:
            found[f"AP_{group}"] = precision[:, :, [frequency == group for frequency in self.frequencies]]
        found["AR"] = self.recall[..., 0]
        return {name: values.nanmean().item() for name, values in found.items()}


def evaluate(
    annotations: Path | str | Annotations,
    detections: Detections,
    kind: str = "bbox",
    frequencies: Sequence[str] | None = None,
) -> dict[str, float]:
    """The measures of a submission, see `Score.measures`; arguments and errors are those of `score`."""
    return score(annotations, detections, kind, frequencies).measures()


def score(
    annotations: Path | str | Annotations,
    detections: Detections,
    kind: str = "bbox",
    frequencies: Sequence[str] | None = None,
) -> Score:
    """Compare what was found with what is there.

    Args:
        annotations: an LVIS annotation file.
        detections: an LVIS submission, see `read_detections`; nothing found at all is AP 0. Of an image the 300 best
            count.
        kind: ``bbox`` or ``segm``: whether boxes or masks must overlap.
        frequencies: ``[C]`` of r, c or f; default: what the annotation file says. `frequency_groups` gives those of
            training images.

    Raises:
        UserError: a file is not what it should be, ``kind`` is neither, or there are not C frequencies.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    truth = annotations if isinstance(annotations, Annotations) else read_annotations(Path(annotations))
    groups = tuple(frequencies or (category.frequency for category in truth.categories))
    if len(groups) != len(truth.categories) or not set(groups) <= set(FREQUENCIES):
        raise UserError(f"frequencies must be r, c or f for each of {len(truth.categories)} categories; got {groups}")

    marked: dict[int, list[Annotation]] = defaultdict(list)
    judged: dict[int, set[int]] = {}
    for image in truth.images:
        objects = [item for item in truth.by_image[image.id] if item.area > 0]
        judged[image.id] = {item.category_id for item in objects} | image.negative
        for item in objects:
            marked[item.category_id].append(item)
    found: dict[int, list[Detection]] = defaultdict(list)
    for detection in best(read_detections(detections, truth)):
        if detection.category_id in judged[detection.image.id] and detection.area() > 0:
            found[detection.category_id].append(detection)

    images = {image.id: image for image in truth.images}
    precision = torch.full((10, 101, len(groups), 4), torch.nan, dtype=torch.float64)
    recall = torch.full((10, len(groups), 4), torch.nan, dtype=torch.float64)
    # Class by class, on the images where it is judged: every image with every class would be 24 million of LVIS v1.
    for place, category in enumerate(truth.categories):
        if category.id in marked:
            curves = _curves(marked[category.id], found[category.id], images, kind)
            precision[:, :, place], recall[:, place] = map(_defined, curves)
    return Score(precision, recall, groups)


def _curves(
    marked: Sequence[Annotation], found: Sequence[Detection], images: Mapping[int, Image], kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Precision ``[10, 101, 4]`` and recall ``[10, 4]`` of one class; -1 where it has no object."""
    category = marked[0].category_id
    shown = {item.image_id for item in marked} | {item.image.id for item in found}
    entries = [
        {
            "id": image.id,
            "height": image.height,
            "width": image.width,
            "neg_category_ids": image.negative,
            "not_exhaustive_category_ids": image.not_exhaustive,
        }
        for image in map(images.__getitem__, shown)
    ]
    with_masks = kind == "segm"
    objects = [_object(number, item, images[item.image_id], with_masks) for number, item in enumerate(marked, 1)]
    guesses = [_guess(number, item, with_masks) for number, item in enumerate(found, 1)]
    # Frequencies are counted by us; the library wants one of every category.
    shared = {"images": entries, "categories": [{"id": category, "frequency": "r"}]}
    compared = COCOeval_faster(
        COCO({**shared, "annotations": objects}, print_function=_quiet),
        COCO({**shared, "annotations": guesses}, print_function=_quiet),
        kind,
        print_function=_quiet,
        lvis_style=True,
    )
    compared.params.maxDets = [MOST]
    compared.evaluate()
    compared.accumulate()
    return compared.eval["precision"][:, :, 0, :, 0], compared.eval["recall"][:, 0, :, 0]


def _object(number: int, item: Annotation, image: Image, with_mask: bool) -> dict[str, Any]:
    entry = {"id": number, "image_id": item.image_id, "category_id": item.category_id, "area": item.area}
    if not with_mask:
        return {**entry, "bbox": list(item.bbox)}
    try:
        return {**entry, "segmentation": run_lengths(item.segmentation, image.height, image.width)}
    except ValueError as error:
        raise UserError(f"annotation {item.id}: {error}") from error


def _guess(number: int, item: Detection, with_mask: bool) -> dict[str, Any]:
    entry = {"id": number, "image_id": item.image.id, "category_id": item.category_id, "area": item.area()}
    place = {"segmentation": item.mask()} if with_mask else {"bbox": list(item.box())}
    return {**entry, **place, "score": item.score}


def _defined(values: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.where(tensor > -1, torch.nan)


def _quiet(*_: object) -> None:
    """In place of the library's printing."""
