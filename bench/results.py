"""Results files: what they hold, one row for each benchmark, and how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.shapes import ALL
from bench.works import WORKS
from tde_kernels import info

FOLDER = Path(__file__).parent / "results"
OURS = "tde_kernels"
LIMITS = {name for work in WORKS.values() for name in work.limits}
REGRESSION = 1.10  # how much larger a ratio of ours has to be to be named
# Files of before 2026-11-25 know one backend and one dtype, and put three works in one group
_EARLIER_ALPHA = {
    "sweep": ("sweep", f"{OURS} cpu"),
    "sweep by inference": ("sweep", "by_inference"),
    "all alphas": ("segments", f"{OURS} cpu"),
    "topk": ("topk", f"{OURS} cpu"),
    "topk of inference": ("topk", "by_inference"),
}


@dataclass(frozen=True)
class Row:
    """The figures of one benchmark; those that a file does not have are None."""

    work: str
    shape: str
    dtype: str
    rival: str
    ratio: float
    seconds: float
    info: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.work, self.shape, self.dtype, self.rival

    @property
    def ours(self) -> bool:
        return self.rival.split()[0] == OURS

    @property
    def is_limit(self) -> bool:
        return self.rival in LIMITS


def row(group: str, info: dict[str, Any], seconds: float = float("nan")) -> Row:
    """A benchmark's row; ``seconds`` where its own figures have none."""
    work, shape = group.split()[:2]
    rival = info["rival"]
    if work == "alpha":
        work, rival = _EARLIER_ALPHA[rival]
    elif rival == OURS:
        rival = f"{OURS} cpu"
    ratio = next(info[name] for name in ("ratio", "ratio_to_bare", "ratio_to_inference") if name in info)
    return Row(work, shape, info.get("dtype", "float32"), rival, ratio, info.get("seconds", seconds), info)


@dataclass(frozen=True)
class File:
    """A results file."""

    path: Path
    machine: dict[str, Any]
    commit: str
    date: str
    rows: tuple[Row, ...]
    overhead: tuple[dict[str, Any], ...]
    again: tuple[File, ...] = ()  # the files whose figures have taken the place of this one's

    def amended(self, later: File) -> File:
        """With the figures of ``later`` in place of those that it has measured again, on the same device."""
        if later.device != self.device:
            raise ValueError(f"{later.path} must be of {self.device}, as {self.path} is, got {later.device}")
        rows = {row.key: row for row in (*self.rows, *later.rows)}
        again = (*self.again, later)
        return replace(self, rows=tuple(rows.values()), overhead=later.overhead or self.overhead, again=again)

    @property
    def device(self) -> str:
        """What figures may be compared across: the device, and the kernels that run there."""
        name = self.machine.get("device", self.machine["cpu"]["brand_raw"])
        return f"{name}, {self.machine['tde_kernels'].get('cpu', '')}"


def load(path: Path) -> File:
    """Reads a file of this suite, or one of the GPU check with it inside."""
    data = json.loads(path.read_text())
    data = data.get("suite") or data
    benchmarks = data["benchmarks"]
    timed = [b for b in benchmarks if "layer" not in b["extra_info"] and any("ratio" in key for key in b["extra_info"])]
    return File(
        path,
        data["machine_info"],
        data["commit_info"]["id"],
        data["datetime"][:10],
        tuple(row(b["group"], b["extra_info"], b["stats"]["median"]) for b in timed if b["group"].split()[1] in ALL),
        tuple(b["extra_info"] for b in benchmarks if "layer" in b["extra_info"]),
    )


def earlier(current: File, folder: Path = FOLDER) -> File | None:
    """The newest file of the same device with an earlier date, if there is one."""
    found = []
    for path in folder.glob("*.json"):
        try:
            file = load(path)
        except KeyError:  # a GPU check that did not get as far
            continue
        if file.device == current.device and file.date < current.date:
            found.append(file)
    return max(found, key=lambda file: file.date, default=None)


@dataclass(frozen=True)
class Change:
    """A figure of ours, before and now."""

    now: Row
    before: Row

    @property
    def factor(self) -> float:
        return self.now.ratio / self.before.ratio

    @property
    def is_regression(self) -> bool:
        return self.factor > REGRESSION


def changes(now: Iterable[Row], before: Iterable[Row]) -> list[Change]:
    """What both have of ours."""
    known = {row.key: row for row in before}
    return [Change(row, known[row.key]) for row in now if row.ours and row.key in known]


def device_name() -> str:
    """What results of this machine's CPU are filed under: its instruction set, by which they differ most."""
    return f"cpu-{info().build.get('cpu', 'reference').split()[0]}"


if __name__ == "__main__":
    print(device_name())
