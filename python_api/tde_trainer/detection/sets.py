"""Sets of images with LVIS's annotations, by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tde_trainer.detection.annotations import Annotations, frequency_groups, read_annotations
from tde_trainer.detection.schema import DetectionDataConfig
from tde_trainer.detection.shapes import write_shapes
from tde_trainer.errors import UserError


@dataclass(frozen=True)
class Files:
    """Names of a set's annotation files."""

    train: str
    test: str
    val: str = ""  # that alpha is chosen on; empty where there is none


SETS = {
    "lvis_v1": Files("lvis_v1_train.json", "lvis_v1_val.json"),
    "lvis_v0.5": Files("lvis_v0.5_train.json", "lvis_v0.5_val.json"),
    "lvis": Files("train.json", "test.json", "val.json"),  # one's own
    "shapes_lvis": Files("train.json", "test.json", "val.json"),
}


@dataclass(frozen=True)
class DetectionData:
    """Training images, those that are reported on, and those that alpha is chosen on."""

    train: Annotations
    test: Annotations
    val: Annotations | None
    root: Path

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels 1 .. C."""
        return tuple(category.name for category in self.train.categories)

    @property
    def class_counts(self) -> Tensor:
        """Number of training images that show each class, ``[C]`` int64."""
        return self.train.image_counts()

    @property
    def groups(self) -> tuple[str, ...]:
        """r, c or f of each class, by its number of training images."""
        return frequency_groups(self.class_counts)


def prepare_set(config: DetectionDataConfig) -> None:
    """Draw the images of shapes_lvis, where they are not there yet."""
    if config.name == "shapes_lvis":
        write_shapes(Path(config.root), train_images=config.train_images, size=config.min_size)


def load_set(config: DetectionDataConfig) -> DetectionData:
    """The annotations of a set.

    Raises:
        UserError: a file is missing or damaged, or the files differ in their categories.
    """
    names, folder = SETS[config.name], _folder(config)
    train, test = read_annotations(folder / names.train), load_test(config)
    val = read_annotations(folder / names.val) if names.val else None
    known = {category.id for category in train.categories}
    for other in (test, val):
        found = known if other is None else {category.id for category in other.categories}
        if other is not None and found != known:
            odd = sorted(found ^ known)[0]
            raise UserError(f"{other.path} and {train.path} must have the same categories; only one of them has {odd}")
    return DetectionData(train, test, val, Path(config.root))


def load_test(config: DetectionDataConfig) -> Annotations:
    """The annotations of a set's test images.

    Raises:
        UserError: the file is missing or damaged.
    """
    return read_annotations(_folder(config) / SETS[config.name].test)


def _folder(config: DetectionDataConfig) -> Path:
    return Path(config.annotations or config.root)
