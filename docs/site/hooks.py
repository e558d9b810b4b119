"""The site has the repository's layout, so that a link between two pages is the same one in both."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BESIDE = ("*.md", "LICENSE", "examples/*.py")  # of the repository, beside the folder of pages


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Puts pages under ``docs/`` and what lies beside them next to it."""
    root = Path(config.docs_dir).parent

    def of_repository(path: str) -> File:
        return File(path, str(root), config.site_dir, config.use_directory_urls)

    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
        if not file.inclusion.is_excluded():
            files.append(of_repository(f"docs/{file.src_uri}"))
    for path in sorted(path for pattern in BESIDE for path in root.glob(pattern)):
        files.append(of_repository(path.relative_to(root).as_posix()))
    return files
