"""The code blocks of the pages, and what a page says about testing them, in comments that no reader sees.

``<!-- test: setup``, lines of Python, ``-->`` runs among the page's blocks: it defines what they take for granted.
``<!-- test: skip, REASON -->`` right before a block leaves it out, and the test run says why.
``<!-- test: quoted -->`` right before a block of Python: it does not run, but stands in the package's own source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

_SETUP = re.compile(r"<!-- test: setup\n(.*)-->\s*", re.DOTALL)
_SKIP = re.compile(r"<!-- test: skip, (.+) -->\s*")
_QUOTED = re.compile(r"<!-- test: quoted -->\s*")


@dataclass(frozen=True)
class Block:
    """A fenced block, or a hidden one."""

    page: Path
    line: int  # of its first line of code, from 1
    language: str
    code: str
    skip: str = ""  # why it does not run
    quoted: bool = False  # from the package's source

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def parse(page: Path, text: str) -> list[Block]:
    """All blocks of a page's text, in order.

    Raises:
        ValueError: a comment begins with ``test:`` and is none of these, or a skip does not stand before a block.
    """
    blocks, skip, quoted = [], "", False
    for token in MarkdownIt("commonmark").parse(text):
        start = token.map[0] + 2 if token.map else 0
        where = f"{page.name}:{start - 1}"
        if token.type == "fence":
            blocks.append(Block(page, start, token.info.split(" ")[0], token.content, skip, quoted))
            skip, quoted = "", False
        elif skip and token.type in ("paragraph_open", "heading_open", "html_block"):
            raise ValueError(f"{where}: 'test: skip, {skip}' stands before no block")
        if token.type == "html_block" and token.content.startswith("<!-- test:"):
            setup, left_out = _SETUP.fullmatch(token.content), _SKIP.fullmatch(token.content)
            quoted = _QUOTED.fullmatch(token.content) is not None
            if setup:
                blocks.append(Block(page, start, "python", setup[1]))
            elif left_out:
                skip = left_out[1]
            elif not quoted:
                raise ValueError(f"{where}: a test comment is '<!-- test: setup', 'skip, REASON -->' or 'quoted -->'")
    return blocks


@cache
def of_page(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    return parse(page, page.read_text(encoding="utf-8"))


def in_language(*languages: str) -> list[Block]:
    """Every page's blocks of these languages."""
    return [block for page in PAGES for block in of_page(page) if block.language in languages]
