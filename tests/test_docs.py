"""Every code block of the pages runs, or is checked as far as it can be without hours, GPUs or a network."""

from __future__ import annotations

import doctest
import json
import os
import runpy
import socket
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import docs_shell
import pytest
import torch
import yaml
from docs_blocks import PAGES, ROOT, Block, in_language, of_page, parse
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import tde_kernels

PYTHON = [page for page in PAGES if any(block.language in ("python", "pycon") for block in of_page(page))]
SKIPPED = [block for page in PAGES for block in of_page(page) if block.skip]
OTHERS = ("bash", "cpp", "json", "pycon", "python", "text", "yaml")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def aside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A folder to write into, no network, small images for detectors, and nothing left behind."""

    def offline(*address: Any, **options: Any) -> None:
        raise OSError(f"a block of the documentation asked for {address}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr(GeneralizedRCNNTransform, "resize", lambda self, image, target=None: (image, target))
    with mock.patch.dict(os.environ), warnings.catch_warnings():
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(blocks: list[Block]) -> None:
    """Runs a page's Python, in order and in one namespace; a traceback names the page's own lines."""
    namespace: dict[str, Any] = {"__name__": "page", "__file__": str(blocks[0].page)}
    for block in blocks:
        if block.skip or block.quoted:
            continue
        if block.language == "python":
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, str(block.page), "exec"), namespace)
        elif block.language == "pycon":
            converse(block, namespace)


def converse(block: Block, namespace: dict[str, Any]) -> None:
    """Runs an interpreter's session: what it prints or raises must be what the page shows, ``...`` standing for any."""
    session = doctest.DocTestParser().get_doctest(block.code, namespace, str(block), str(block.page), block.line - 1)
    differences: list[str] = []
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(optionflags=options).run(session, out=differences.append, clear_globs=False)
    namespace |= session.globs
    assert not differences, "".join(differences)


@pytest.mark.parametrize("page", PYTHON, ids=name_of)
@pytest.mark.usefixtures("aside")
def test_python(page: Path) -> None:
    run(of_page(page))


@pytest.mark.parametrize("block", [block for block in in_language("bash") if not block.skip], ids=str)
@pytest.mark.usefixtures("aside")
def test_shell(block: Block) -> None:
    for words in docs_shell.commands(block.code):
        docs_shell.check(words)


@pytest.mark.parametrize("block", SKIPPED, ids=str)
def test_left_out(block: Block) -> None:
    pytest.skip(block.skip)


def test_data() -> None:
    for block in in_language("json", "yaml"):
        (json.loads if block.language == "json" else yaml.safe_load)(block.code)


def test_sources_are_quoted_as_they_are() -> None:
    paths = [*(ROOT / "csrc").rglob("*.*"), *Path(tde_kernels.__file__).parent.rglob("*.py")]
    sources = [dense(path.read_text()) for path in paths]
    quotations = [*in_language("cpp"), *(block for block in in_language("python") if block.quoted)]
    for block in quotations:
        for part in block.code.split("...\n"):
            assert any(dense(part) in source for source in sources), f"{block}: no source has\n{part}"


def dense(code: str) -> str:
    """Without indentation, of which a quotation leaves some out."""
    return "\n".join(line.strip() for line in code.strip().splitlines())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in of_page(page):
        assert block.language in OTHERS, f"{block}: must be one of {OTHERS}, got {block.language!r}"


def test_a_broken_example_is_red() -> None:
    page = "Text\n\n<!-- test: setup\nx = 1\n\ny = 2\n-->\n\n```python\nx + z\n```\n"
    blocks = parse(ROOT / "page.md", page)
    assert [(block.line, block.code) for block in blocks] == [(4, "x = 1\n\ny = 2\n"), (10, "x + z\n")]
    with pytest.raises(NameError, match="z") as error:
        run(blocks)
    assert (Path(error.traceback[-1].path).name, error.traceback[-1].lineno + 1) == ("page.md", 10)


def test_a_message_that_is_another_is_red() -> None:
    page = "```pycon\n>>> x = 1\n>>> x + '1'\nTraceback (most recent call last):\n    ...\nTypeError: {}\n```\n"
    blocks = [parse(ROOT / "page.md", page.format(said)) for said in ("unsupported operand ...", "something else")]
    run(blocks[0])
    with pytest.raises(AssertionError, match="something else"):
        run(blocks[1])


@pytest.mark.parametrize(
    ("element", "refused"),
    [
        ('<link rel="stylesheet" href="https://fonts.example/css">', True),
        ('<link href="//fonts.example" rel="preconnect">', True),
        ("<script async src=https://cdn.example/mathjax.js>", True),
        ('<img alt="plot" src="http://example.org/plot.png">', True),
        ('<link rel="canonical" href="http://localhost:8000/index.html">', False),
        ('<script src="../assets/search.js">', False),
        ('<a href="https://arxiv.org/abs/2009.12991">', False),
    ],
)
def test_no_page_fetches_from_elsewhere(element: str, refused: bool) -> None:
    pytest.importorskip("mkdocs", reason='mkdocs builds the site; pip install -e ".[docs]"')
    hooks = runpy.run_path(str(ROOT / "docs" / "site" / "hooks.py"))
    assert bool(hooks["FETCHED"].search(f"<p>text</p>{element}")) == refused


@pytest.mark.parametrize("comment", ["<!-- test: skip -->", "<!-- test: set-up\nx = 1\n-->", "<!-- test: skip, no -->"])
def test_a_comment_that_does_nothing_is_red(comment: str) -> None:
    with pytest.raises(ValueError, match=r"^page.md:\d+: "):
        parse(ROOT / "page.md", f"{comment}\n\ntext\n\n```python\n1\n```\n")


@pytest.mark.parametrize(
    "line",
    [
        "tde trian digits_lt",
        "tde train digits",
        "tde train digits_lt sedes=[1]",
        "tde sweep runs/a --maximum 3",
        "tde table 11 runs/a",
        "tde eval runs/a beta=1",
        "tde grid digits_lt head.taus=1,2",
        "make everything",
        'pip install -e ".[training]"',
        "pytest benches/",
        "python -m tde_kernel",
        "python examples/nothing.py",
        "torchrun --processes 2 -m tde_trainer train digits_lt",
        "torchrun --nproc-per-node 2 -m tde_trainer train digits",
        "conda install tde",
    ],
)
@pytest.mark.usefixtures("aside")
def test_a_wrong_command_is_red(line: str) -> None:
    (words,) = docs_shell.commands(line)
    with pytest.raises((Exception, SystemExit)):
        docs_shell.check(words)


def test_commands_are_read_as_a_shell_does() -> None:
    code = "A=1 tde train x \\\n  a=\\[b,c] # why\n\nmake docs && cd build > log; pip install 'a b'"
    assert list(docs_shell.commands(code)) == [
        ["tde", "train", "x", "a=[b,c]"],
        ["make", "docs"],
        ["cd", "build"],
        ["pip", "install", "a b"],
    ]
