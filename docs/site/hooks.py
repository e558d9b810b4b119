"""The site has the repository's layout, so that links between pages are the same in both, and fetches nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

BESIDE = ("*.md", "LICENSE", "examples/*.py")  # of the repository, beside the folder of pages
# A link element names the page's own address too (canonical), and its neighbours
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|link(?![^>]*rel=\"(?:canonical|prev|next)\"))\b"
    r"[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
)


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


def on_post_page(output: str, *, page: Page, **kwargs: Any) -> None:
    """Refuses a page whose reader's browser would fetch something from elsewhere.

    Raises:
        PluginError: there is such a script, style sheet or picture.
    """
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} would fetch from elsewhere when read: {found[0]}")
