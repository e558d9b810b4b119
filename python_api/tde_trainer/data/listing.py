"""List files: a line ``relative/path label`` for every image, plain or gzipped."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tde_trainer.errors import UserError

_LINE = re.compile(r"(.*)\s(\S+)")  # the label is the last field: paths may hold spaces


@dataclass(frozen=True)
class Listing:
    """What a list file says, an entry for every line that is not blank."""

    file: Path
    paths: list[str] = field(default_factory=list)  # of images, relative to their root
    labels: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)  # counted from 1

    def place(self, index: int) -> str:
        """Where entry ``index`` stands, for people."""
        return f"{self.file}, line {self.lines[index]}"

    def num_classes(self) -> int:
        """C of a list that has all of its classes.

        Raises:
            UserError: labels are not 0 .. C - 1.
        """
        largest, present = max(self.labels), set(self.labels)
        missing = next((label for label in range(len(present)) if label not in present), None)
        if missing is not None:
            raise UserError(
                f"{self.place(self.labels.index(largest))}: label {largest}, while no image has label {missing}; the "
                "labels of a training list must be 0 .. C - 1, each of them with an image"
            )
        return largest + 1

    def check_classes(self, train: Listing) -> None:
        """Look for classes that are not trained.

        Raises:
            UserError: there is one.
        """
        num_classes = train.num_classes()
        for index, label in enumerate(self.labels):
            if label >= num_classes:
                raise UserError(
                    f"{self.place(index)}: label {label}, while {train.file} has labels 0 .. {num_classes - 1}"
                )


def read_list(file: Path) -> Listing:
    """Parse a list file. Blank lines are skipped.

    Raises:
        UserError: the file is missing, unreadable or lists nothing; a line is not a path inside the root and a label.
    """
    listing = Listing(file)
    for number, line in read_lines(file):
        path, label = _entry(line, f"{file}, line {number}")
        listing.paths.append(path)
        listing.labels.append(label)
        listing.lines.append(number)
    if not listing.paths:
        raise UserError(f"{file} lists nothing; wanted are lines `relative/path label`")
    return listing


def list_file(folder: Path, name: str) -> Path | None:
    """``name`` or ``name.gz`` in ``folder``, whichever is there."""
    return next(filter(Path.is_file, (folder / name, folder / f"{name}.gz")), None)


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, plain or gzipped, that are not blank, and their numbers.

    Raises:
        UserError: the file is missing or damaged, a line is not UTF-8.
    """
    try:
        content = file.read_bytes()
        lines = (gzip.decompress(content) if file.suffix == ".gz" else content).splitlines()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode().strip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}, line {number}: is not UTF-8 text") from error
        if text.strip():
            yield number, text


def _entry(line: str, place: str) -> tuple[str, int]:
    found = _LINE.fullmatch(line.rstrip())
    if found is None:
        raise UserError(f"{place}: no label in {line!r}; wanted is `relative/path label`")
    path, label = found[1].strip(), found[2]
    if not (label.isascii() and label.isdigit()):
        raise UserError(f"{place}: label {label!r} must be a whole number from 0")
    if not path:
        raise UserError(f"{place}: no path before label {label}")
    if path.startswith("/") or ".." in path.split("/"):
        raise UserError(f"{place}: {path} must be relative to the root of the images, and stay inside")
    return path, int(label)
