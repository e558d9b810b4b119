"""A small, made set in LVIS's format: long-tailed in training, balanced in validation and test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from faster_coco_eval.core import mask as coco_mask
from numpy.random import Generator, default_rng
from PIL import Image

from tde_trainer.detection.annotations import frequency_groups
from tde_trainer.detection.entries import Segmentation
from tde_trainer.detection.masks import encode, run_lengths
from tde_trainer.detection.shapes_counts import deal_splits
from tde_trainer.detection.shapes_drawing import KINDS, Outline, Scene, box, coverage, draw_scene
from tde_trainer.errors import UserError
from tde_trainer.files import dumps, read_json, write_atomic

Version = Literal["v0.5", "v1"]
Entry = dict[str, Any]

DRAWING = 2  # raise it with every change of what is drawn: sets of before are then not taken for these
NEGATIVES = 3  # classes that a training image is known to lack
NOT_EXHAUSTIVE = 0.05  # of the training images


def write_shapes(
    directory: str | Path,
    *,
    seed: int = 0,
    train_images: int = 600,
    val_images: int = 200,
    test_images: int = 300,
    size: int = 128,
    version: Version = "v1",
) -> None:
    """Write ``train.json``, ``val.json``, ``test.json`` and the PNG images that they name, once.

    The 30 classes are ten shapes in three neighbouring hues. In training a third of them each is frequent, common and
    rare by LVIS's bounds, which are which is random; validation and test hold each class equally often. Rings have
    run-length masks, all others polygons. A training image names some classes that it lacks, the others name all.

    Where the files are there, of the same settings, nothing is done. They are written last, so that an interrupted
    writing is done again. The same settings give the same bytes.

    Args:
        directory: made where it is missing.
        seed: of everything random.
        train_images: of fewer than 600 the counts shrink in proportion, and with them the groups.
        val_images: with 3 shapes an image.
        test_images: with 3 shapes an image.
        size: side of the square images in pixels, from 32.
        version: ``"v1"`` gives every image a ``coco_url``, ``"v0.5"`` a ``file_name``; either ends in, say,
            ``train/000001.png``.

    Raises:
        UserError: ``directory`` holds another set, or cannot be written; a setting is out of range.
    """
    sizes = {"train": train_images, "val": val_images, "test": test_images}
    if min(sizes.values()) < 10 or size < 32 or version not in get_args(Version):
        raise UserError(
            "a set of shapes has 10 images or more a split, a size of 32 or more, and the version v0.5 or v1; "
            f"got {sizes}, {size}, {version}"
        )
    settings = {"seed": seed, "images": sizes, "size": size, "version": version, "drawing": DRAWING}
    directory = Path(directory)
    files = {split: directory / f"{split}.json" for split in sizes}
    if all([_is_there(file, settings) for file in files.values()]):
        return

    dealt = deal_splits(seed, sizes, len(KINDS))
    categories, first, written = _categories(dealt["train"]), 1, {}
    for split, images in sizes.items():
        written[split] = _write_images(directory, split, first, dealt[split], settings)
        first += images
    for split, entries in written.items():
        info = {"description": "Shapes, a made long-tailed set", "version": version, "settings": settings}
        write_atomic(files[split], dumps({"info": info, "categories": categories, **entries}))


def _is_there(file: Path, settings: Entry) -> bool:
    if not file.exists():
        return False
    content = read_json(file)
    found = content.get("info", {}).get("settings") if isinstance(content, dict) else None
    if found != settings:
        raise UserError(
            f"{file} has the settings {found}, wanted are {settings}; choose another directory or delete it"
        )
    return True


def _categories(train: Sequence[Sequence[int]]) -> list[Entry]:
    """As in LVIS, counts and frequencies are those of training in every file."""
    images = torch.tensor([sum(label in held for held in train) for label in range(len(KINDS))])
    frequencies = frequency_groups(images)
    return [
        {
            "id": label + 1,
            "name": name,
            "synonyms": [name],
            "def": f"a {name.replace('_', ' ')}",
            "synset": f"{name}.n.01",
            "frequency": frequencies[label],
            "image_count": int(images[label]),
            "instance_count": sum(held.count(label) for held in train),
        }
        for label, name in enumerate(KINDS)
    ]


def _write_images(
    directory: Path, split: str, first: int, dealt: Sequence[Sequence[int]], settings: Entry
) -> dict[str, list[Entry]]:
    entries: dict[str, list[Entry]] = defaultdict(list)
    folder = directory / split
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for image_id, labels in enumerate(dealt, first):
            rng = default_rng([settings["seed"], image_id])
            scene = draw_scene([KINDS[label] for label in labels], settings["size"], rng)
            name = f"{split}/{image_id:06}.png"
            Image.fromarray(scene.image).save(directory / name)
            source = {"coco_url": f"http://shapes/{name}"} if settings["version"] == "v1" else {"file_name": name}
            size = {"width": settings["size"], "height": settings["size"]}
            entries["images"].append({"id": image_id, **source, **size, **_verified(labels, split, rng)})
            entries["annotations"] += _annotations(scene, labels, image_id)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    for number, annotation in enumerate(entries["annotations"], 1):
        annotation["id"] = number
    return entries


def _verified(labels: Sequence[int], split: str, rng: Generator) -> Entry:
    """Which classes an image is known to lack, and of which it has more than is annotated."""
    absent = sorted(set(range(len(KINDS))) - set(labels))
    partly: list[int] = []
    if split == "train":
        absent = sorted(rng.choice(absent, NEGATIVES, replace=False).tolist())
        if labels and rng.uniform() < NOT_EXHAUSTIVE:
            partly = [labels[0]]
    return {
        "neg_category_ids": [label + 1 for label in absent],
        "not_exhaustive_category_ids": [label + 1 for label in partly],
    }


def _annotations(scene: Scene, labels: Sequence[int], image_id: int) -> list[Entry]:
    side = len(scene.image)
    entries = []
    for label, outline in zip(labels, scene.outlines, strict=True):
        segmentation = _segmentation(outline, side)
        left, upper, right, lower = box(outline).tolist()
        entries.append(
            {
                "image_id": image_id,
                "category_id": label + 1,
                "segmentation": segmentation,
                "area": float(coco_mask.area(run_lengths(segmentation, side, side))),
                "bbox": [round(value, 2) for value in (left, upper, right - left, lower - upper)],
            }
        )
    return entries


def _segmentation(outline: Outline, side: int) -> Segmentation:
    if len(outline) == 1:
        return [outline[0].ravel().round(2).tolist()]
    return encode(torch.from_numpy(coverage(outline, side) >= 0.5))  # polygons have no holes
