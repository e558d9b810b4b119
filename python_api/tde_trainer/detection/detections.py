"""What a detector found: the entries of an LVIS submission."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tde_trainer.detection.annotations import Annotations, Image
from tde_trainer.detection.entries import Box, Entry, Segmentation
from tde_trainer.detection.masks import box_of, pixels, run_lengths
from tde_trainer.errors import UserError
from tde_trainer.files import read_json

MOST = 300  # detections of an image, over all of its classes


@dataclass(frozen=True, slots=True)
class Detection:
    """An object that was found: a box, a mask, or both, of which the one missing follows from the other."""

    index: int  # in the submission
    image: Image
    category_id: int
    score: float
    bbox: Box | None
    segmentation: Segmentation | None

    def box(self) -> Box:
        """The box, or the one around the mask."""
        return self.bbox if self.bbox is not None else box_of(self.mask())

    def area(self) -> float:
        """That of the box in pixels, also where there is a mask; without a box that of the mask."""
        return self.bbox[2] * self.bbox[3] if self.bbox is not None else pixels(self.mask())

    def mask(self) -> dict[str, Any]:
        """Run lengths of the mask, or of the whole box.

        Raises:
            UserError: the segmentation is damaged.
        """
        segmentation = self.segmentation
        if segmentation is None:
            assert self.bbox is not None
            left, top, width, height = self.bbox
            right, bottom = left + width, top + height
            segmentation = [[left, top, left, bottom, right, bottom, right, top]]
        try:
            return run_lengths(segmentation, self.image.height, self.image.width)
        except ValueError as error:
            raise UserError(f"detection {self.index}: {error}") from error


def read_detections(source: Path | str | Sequence[Mapping[str, Any]], annotations: Annotations) -> list[Detection]:
    """Read and check a submission.

    Args:
        source: its file, JSON or gzipped JSON; or its entries ``{image_id, category_id, score}`` with ``bbox`` (left,
            top, width, height in pixels), ``segmentation`` (as in `entries`) or both.
        annotations: whose images and categories the entries name.

    Raises:
        UserError: the file or an entry, which the message names by its index, is no such thing.
    """
    entries = read_json(Path(source)) if isinstance(source, str | Path) else source
    if not isinstance(entries, Sequence):
        raise UserError(f"{source} holds a {type(entries).__name__}; wanted is a list of detections")
    where = f"{source}: detection" if isinstance(source, str | Path) else "detection"
    images = {image.id: image for image in annotations.images}
    return [
        _detection(index, Entry(f"{where} {index}", entry), images, annotations) for index, entry in enumerate(entries)
    ]


def best(detections: Iterable[Detection], most: int = MOST) -> list[Detection]:
    """The ``most`` detections of each image with the highest scores; of equal scores the first ones."""
    by_image: dict[int, list[Detection]] = defaultdict(list)
    for detection in detections:
        by_image[detection.image.id].append(detection)
    kept: list[Detection] = []
    for found in by_image.values():
        kept += found if len(found) <= most else sorted(found, key=lambda item: item.score, reverse=True)[:most]
    return kept


def _detection(index: int, entry: Entry, images: Mapping[int, Image], annotations: Annotations) -> Detection:
    image = images.get(entry.whole("image_id"))
    if image is None:
        entry.refuse("image_id", f"the id of one of the images of {annotations.path}")
    category = entry.whole("category_id")
    if category not in annotations.labels:
        entry.refuse("category_id", f"the id of one of the categories of {annotations.path}")
    if "bbox" not in entry and "segmentation" not in entry:
        raise UserError(f"{entry.place}: has neither bbox nor segmentation")
    bbox = entry.box() if "bbox" in entry else None
    segmentation = entry.segmentation(image.height, image.width) if "segmentation" in entry else None
    return Detection(index, image, category, entry.number("score"), bbox, segmentation)
