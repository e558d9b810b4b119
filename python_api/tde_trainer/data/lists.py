"""Long-tailed data sets given by list files: ImageNet-LT, Places-LT, and any others in that format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os.path import commonpath, dirname
from pathlib import Path, PurePosixPath

from tde_trainer.data.base import LongTailedData
from tde_trainer.data.folder_lt import MEAN, STD
from tde_trainer.data.image_files import ImageFiles
from tde_trainer.data.listing import Listing, list_file, read_lines, read_list
from tde_trainer.data.pipeline import Pipeline
from tde_trainer.errors import UserError
from tde_trainer.schema import SPLITS, DataConfig

JITTER = 0.4


@dataclass(frozen=True)
class Lists:
    """Lists ``PREFIXtrain.txt``, ``PREFIXval.txt`` and ``PREFIXtest.txt``, of paths under ``data.root``.

    ``PREFIXclassnames.txt`` beside them, lines ``wnid name`` in the order of the labels, is optional.

    Attributes:
        num_classes: of the published lists.
        images: of each published list.
    """

    prefix: str = ""
    num_classes: int | None = None
    images: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, config: DataConfig, seed: int) -> LongTailedData:
        """The listed images; the seed chooses nothing.

        Raises:
            UserError: a list or the images' folder is missing, a list is malformed or not the published one.
        """
        root, lists = Path(config.root), Path(config.lists or config.root)
        if not root.is_dir():
            raise UserError(f"data.root={config.root}: there is no such folder; wanted is that of the images")
        read = {split: self._list(lists, split) for split in SPLITS}
        self._check(read, config.name)
        for split in ("val", "test"):
            read[split].check_classes(read["train"])
        found = {
            split: ImageFiles(
                root,
                listing,
                config.image_size,
                skip_corrupt=config.skip_corrupt,
                workers=config.workers,
                training=split == "train",
            )
            for split, listing in read.items()
        }
        pipeline = Pipeline(MEAN, STD, flip=True, jitter=JITTER)
        return LongTailedData(**found, class_names=self._class_names(lists, read["train"]), pipeline=pipeline)

    def _name(self, what: str) -> str:
        return f"{self.prefix}{what}.txt"

    def _list(self, folder: Path, split: str) -> Listing:
        name = self._name(split)
        file = list_file(folder, name)
        if file is None:
            raise UserError(
                f"data.lists={folder}: there is no {name} or {name}.gz; wanted are "
                f"{', '.join(map(self._name, SPLITS))}, of lines `relative/path label`"
            )
        return read_list(file)

    def _check(self, read: Mapping[str, Listing], name: str) -> None:
        train = read["train"]
        found = [(train, train.num_classes(), self.num_classes, "classes")]
        found += [(read[split], len(read[split].paths), count, "images") for split, count in self.images.items()]
        for listing, count, wanted, what in found:
            if wanted is not None and count != wanted:
                raise UserError(
                    f"{listing.file} holds {count:,} {what}, the published {name} {wanted:,}; data.name=list_lt takes "
                    "any lists"
                )

    def _class_names(self, folder: Path, train: Listing) -> tuple[str, ...]:
        file = list_file(folder, self._name("classnames"))
        return _folder_names(train) if file is None else _listed_names(file, train.num_classes())


def _listed_names(file: Path, num_classes: int) -> tuple[str, ...]:
    names = []
    for number, line in read_lines(file):
        _, _, name = line.strip().partition(" ")
        if not name:
            raise UserError(f"{file}, line {number}: no name in {line!r}; wanted is `wnid name`")
        names.append(name.strip())
    if len(names) != num_classes:
        raise UserError(f"{file} names {len(names)} classes, the training list has {num_classes}")
    return tuple(names)


def _folder_names(train: Listing) -> tuple[str, ...]:
    """The classes' folders, as far as they differ, where every class has one of its own; else numbers."""
    folders: list[set[str]] = [set() for _ in range(train.num_classes())]
    for path, label in zip(train.paths, train.labels, strict=True):
        folders[label].add(dirname(path))
    own = set.union(*folders)
    if len(own) != len(folders) or any(len(of_class) > 1 for of_class in folders):
        return tuple(map(str, range(len(folders))))
    above = commonpath(map(dirname, own))
    return tuple(str(PurePosixPath(of_class.pop()).relative_to(above)) for of_class in folders)


imagenet_lt = Lists("ImageNet_LT_", 1000, {"train": 115_846, "val": 20_000, "test": 50_000})
places_lt = Lists("Places_LT_", 365, {"train": 62_500})
list_lt = Lists()
