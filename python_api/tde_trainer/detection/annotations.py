"""LVIS's annotation files, v0.5 and v1: images, categories, and the objects that are marked in the images."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tde_trainer.detection.entries import Box, Entry, Segmentation
from tde_trainer.errors import UserError
from tde_trainer.files import read_json

FREQUENCIES = ("r", "c", "f")  # rare, common, frequent
SMALLEST = 1e-3  # side of a box, in pixels: in float32 a smaller one at an image's far edge has none
RARE, COMMON = 10, 100  # the most training images of either

_NAME_OF_2014 = re.compile(r"COCO_(train|val|test)2014_")  # v0.5 gives it, of images that lie in COCO's folders of 2017


@dataclass(frozen=True, slots=True)
class Category:
    """A class of objects."""

    id: int
    name: str
    frequency: str  # one of `FREQUENCIES`


@dataclass(frozen=True, slots=True)
class Image:
    """An image, of which only some categories are annotated: those with an annotation, and the negative ones."""

    id: int
    width: int
    height: int
    file_name: str  # relative to the root of the images, such as train2017/000000000009.jpg
    negative: frozenset[int]  # ids of categories that the image certainly does not show
    not_exhaustive: frozenset[int]  # ids of categories of which some objects may be left unmarked


@dataclass(frozen=True, slots=True)
class Annotation:
    """An object in an image."""

    id: int
    image_id: int
    category_id: int
    bbox: Box
    area: float  # of the mask, in pixels
    segmentation: Segmentation


@dataclass(frozen=True)
class Annotations:
    """An annotation file."""

    path: Path
    categories: tuple[Category, ...]  # C of them, in the order of their ids
    images: tuple[Image, ...]  # in the order of the file
    by_image: dict[int, list[Annotation]]  # by the image's id, of every image; empty where nothing is marked

    @cached_property
    def labels(self) -> dict[int, int]:
        """Category id to label 1 .. C; 0 is the background. ``categories[label - 1]`` leads back."""
        return {category.id: label for label, category in enumerate(self.categories, 1)}

    def image_counts(self) -> Tensor:
        """Number of images that show each class, ``[C]`` int64, counted from the annotations."""
        counts = torch.zeros(len(self.categories), dtype=torch.int64)
        for marked in self.by_image.values():
            shown = {self.labels[annotation.category_id] - 1 for annotation in marked}
            counts[list(shown)] += 1
        return counts


def trainable(annotation: Annotation) -> bool:
    """Whether an object can be learned from: neither its box nor its mask is empty."""
    _, _, width, height = annotation.bbox
    return min(width, height) >= SMALLEST and annotation.area > 0


def frequency_groups(counts: Tensor) -> tuple[str, ...]:
    """The group of each class by its number of training images: ``r`` up to 10, ``c`` up to 100, ``f`` above.

    A class without a training image is rare.

    Args:
        counts: ``[C]``, as `Annotations.image_counts` of the training file gives them.
    """
    return tuple("r" if count <= RARE else "c" if count <= COMMON else "f" for count in counts.tolist())


def read_annotations(path: Path) -> Annotations:
    """Read and check an annotation file, JSON or gzipped JSON.

    v0.5 and v1 differ in the images alone: v1 names their addresses (``coco_url``, of which the last two parts name the
    file), v0.5 their files besides (``file_name``, which counts where it says the folder or there is no address).
    Images without annotations are kept, and so are objects of zero area, which `trainable` tells apart.

    Raises:
        UserError: the file is missing or is not such a file; the message names the entry.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; wanted are LVIS annotations, a mapping")
    categories = _entries(path, content, "categories", _category)
    images = _entries(path, content, "images", _image)
    by_image: dict[int, list[Annotation]] = {image: [] for image in images}
    annotations = _entries(path, content, "annotations", lambda entry: _annotation(entry, images, categories))
    for annotation in annotations.values():
        by_image[annotation.image_id].append(annotation)
    ordered = sorted(categories.values(), key=lambda category: category.id)
    return Annotations(path, tuple(ordered), tuple(images.values()), by_image)


_T = TypeVar("_T", Category, Image, Annotation)


def _entries(path: Path, content: dict[str, Any], key: str, parse: Callable[[Entry], _T]) -> dict[int, _T]:
    """The entries of a list by their ids, in order."""
    if not isinstance(content.get(key), list):
        raise UserError(
            f"{path}: no list {key}; wanted are LVIS annotations, the lists categories, images, annotations"
        )
    found: dict[int, _T] = {}
    for index, item in enumerate(content[key]):
        entry = Entry(f"{path}: {key}[{index}]", item)
        parsed = parse(entry)
        if parsed.id in found:
            entry.refuse("id", "one that no other entry has")
        found[parsed.id] = parsed
    return found


def _category(entry: Entry) -> Category:
    frequency = entry.text("frequency")
    if frequency not in FREQUENCIES:
        entry.refuse("frequency", "r, c or f")
    return Category(entry.whole("id"), entry.text("name"), frequency)


def _image(entry: Entry) -> Image:
    key, name = "file_name", _NAME_OF_2014.sub("", entry.text("file_name")) if "file_name" in entry else ""
    if "/" not in name and ("coco_url" in entry or not name):  # the name does not say in which folder
        key, name = "coco_url", "/".join(entry.text("coco_url").split("/")[-2:])
    if name.startswith("/") or ".." in name.split("/"):
        entry.refuse(key, "relative to the root of the images, and inside")
    return Image(
        entry.whole("id"),
        entry.whole("width", 1),
        entry.whole("height", 1),
        name,
        entry.ids("neg_category_ids"),
        entry.ids("not_exhaustive_category_ids"),
    )


def _annotation(entry: Entry, images: dict[int, Image], categories: dict[int, Category]) -> Annotation:
    image = images.get(entry.whole("image_id"))
    if image is None:
        entry.refuse("image_id", "the id of one of the images")
    category = entry.whole("category_id")
    if category not in categories:
        entry.refuse("category_id", "the id of one of the categories")
    for key in ("iscrowd", "ignore"):
        if key in entry and entry.content[key] != 0:
            entry.refuse(key, "0: LVIS has no such objects")
    box, area = entry.box(), entry.number("area")
    segmentation = entry.segmentation(image.height, image.width)
    return Annotation(entry.whole("id"), image.id, category, box, area, segmentation)
