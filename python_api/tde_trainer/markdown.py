"""Pages in markdown, from templates."""

from __future__ import annotations

from typing import Any

import jinja2

from tde_trainer.table import counts_in_words, percent


def render(template: str, **values: Any) -> str:
    """The page; templates may say ``percent(entry)`` of a mean and spread, ``counts_in_words(counts)`` of classes."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tde_trainer"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values, percent=percent, counts_in_words=counts_in_words)
