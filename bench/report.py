"""``python -m bench.report RESULTS.json [AGAIN.json ...] [--against EARLIER.json]``: docs/performance.md and its plots.

Nobody edits them by hand. A ratio of ours that grew by more than 10% since the earlier file is named, in the page and
on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

from bench import plots, results
from bench.page import page, text
from bench.results import File

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def draw(file: File, folder: Path) -> list[str]:
    """Writes the plots that there are figures for, and returns their names."""
    pictures = {name: plots.growth(file.rows, axis) for axis, name in plots.GROWTH.items()}
    pictures[plots.ROOFLINE] = plots.roofline(file.rows, file.machine.get("roofs", {}))
    drawn = {name: picture for name, picture in pictures.items() if picture is not None}
    for name, picture in drawn.items():
        (folder / name).write_bytes(picture)
    return list(drawn)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="what a later one has measured again is taken from it")
    parser.add_argument("--against", type=Path, help="an earlier results file (default: the newest of this device)")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write (default: docs/performance.md)")
    asked = parser.parse_args(arguments)
    first, *others = map(results.load, asked.results)
    file = reduce(File.amended, others, first)
    before = results.load(asked.against) if asked.against else results.earlier(file)
    images = asked.page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    asked.page.write_text(page(file, before, draw(file, images)), encoding="utf-8")
    print(f"wrote {asked.page} and its plots")
    if before is not None:
        for change in results.changes(file.rows, before.rows):
            if change.is_regression:
                print(f"slower than in {before.path.name}: {text(change)}", file=sys.stderr)


if __name__ == "__main__":
    main()
