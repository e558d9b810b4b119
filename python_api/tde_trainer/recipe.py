"""Recipes as text: those of the package by name, the user's own by path."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from tde_trainer.errors import UserError, unknown


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = files("tde_trainer") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def recipe_text(recipe: str) -> str:
    """YAML text of a packaged recipe (by name) or of the user's own (by path).

    Raises:
        UserError: there is no such recipe or file.
    """
    if recipe in recipe_names():
        return (files("tde_trainer") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    path = Path(recipe)
    if path.suffix not in {".yaml", ".yml"}:
        raise unknown("recipe", recipe, recipe_names())
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read recipe {recipe}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {recipe} is not a text file") from error
