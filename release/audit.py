"""``python -m release.audit``: whether a vulnerability is known of any pinned package. A part of ``make lint``.

Where pip-audit's service cannot be reached, or does not know the packages, this says so in a line and passes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from release.lock import FOLDER
from release.tools import run

UNREACHABLE = re.compile(r"^(requests\.exceptions\.\w+:|.*your network may be blocking this service)", re.MULTILINE)


def locks() -> list[str]:
    """The pinned requirements."""
    return sorted(str(path) for path in FOLDER.glob("*.txt") if "--hash" in path.read_text())


def judge(returned: int, answer: str, errors: str) -> tuple[bool, list[str]]:
    """Whether pip-audit's end is one to pass, and what to say of it.

    Args:
        returned: its exit status.
        answer: its standard output, JSON if it came to an end.
        errors: its standard error.
    """
    if returned and not answer.strip():
        if UNREACHABLE.search(errors):
            return True, ["audit: pip-audit cannot reach its service; nothing was looked up"]
        return False, [f"audit: pip-audit failed: {errors.strip()[-2000:]}"]
    packages = json.loads(answer)["dependencies"]
    known = [package for package in packages if "skip_reason" not in package]
    said = [f"audit: {len(known)} of {len(packages)} packages looked up"]
    if len(known) < len(packages):
        said[0] += "; pip-audit's service does not know the others"
    found = [line for package in known for line in vulnerabilities(package)]
    return not found and not returned, said + found


def vulnerabilities(package: dict[str, Any]) -> Iterable[str]:
    """A line for each that is known."""
    for known in package["vulns"]:
        fixed = ", ".join(known["fix_versions"]) or "no version yet"
        yield f"{package['name']} {package['version']}: {known['id']}, fixed by {fixed}"


def main() -> None:
    """Audits ``requirements/``."""
    command = ["pip-audit", "--require-hashes", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
    command += ["--timeout", "5", *(word for path in locks() for word in ("--requirement", path))]
    done = run(command, check=False, capture=True)
    passes, said = judge(done.returncode, done.stdout, done.stderr)
    print(*said, sep="\n")
    raise SystemExit(not passes)


if __name__ == "__main__":
    main()
