"""A recipe read, overridden and checked against the schema and the registries."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError  # type: ignore[import-untyped]

from tde_trainer.data import DATASETS
from tde_trainer.detection.check import check_detectors
from tde_trainer.detection.schema import DetectionConfig
from tde_trainer.errors import UserError, unknown
from tde_trainer.methods import METHODS, SecondStage
from tde_trainer.models import builder
from tde_trainer.recipe import recipe_text
from tde_trainer.samplers import SAMPLERS
from tde_trainer.scaling.schema import ScalingConfig, check_scaling
from tde_trainer.schema import LARGEST_SEED, Config, RunConfig

# What the user may write for a key of ours: one method, and a word that Python keeps for itself.
ALIASES = {"method": "methods", "from": "stage_one"}
# These say where and how to run, not what to compute: a resumed run may change them.
NOT_PART_OF_A_RUN = ("out", "resume", "overwrite", "data.workers")
# And these where things lie and what is said of them: a checkpoint is the same whatever they are.
PLACES = ("data.root", "data.lists", "data.annotations", "data.download", "data.note", "stage_one")
# Files and folders, in which ~ is the user's home: a shell leaves it alone after KEY=.
PATHS = ("out", "data.root", "data.lists", "data.annotations", "stage_one")


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Schema defaults, then the recipe, then the schedule of its choice, then ``key=value`` overrides; checked.

    Raises:
        UserError: unknown recipe, key or name; a value of the wrong type or out of range.
    """
    try:
        written = OmegaConf.create(recipe_text(recipe))
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"recipe {recipe} is not valid YAML: {_problem(error)}") from error
    if not isinstance(written, DictConfig):
        raise UserError(f"recipe {recipe} must be a mapping of keys to values")
    given = parse_overrides(overrides)
    schedules = written.pop("schedules", OmegaConf.create({}))
    schedule = str(given.get("schedule", written.get("schedule", "")))
    if not isinstance(schedules, Mapping) or (schedule and not schedules):
        raise UserError(f"recipe {recipe} has no schedules to choose from")
    if schedule and schedule not in schedules:
        raise unknown("schedule", schedule, map(str, schedules))
    config = config_from(written, schedules[schedule] if schedule else {}, given)
    second = "_stage_two" if isinstance(config, Config) and config.stage_one else ""
    config.out = config.out or f"runs/{Path(recipe).stem}{second}"
    return config


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """`load_recipe`, for what can be done with classifiers alone."""
    return classifiers(load_recipe(recipe, overrides), f"recipe {recipe}")


def classifiers(config: RunConfig, what: str) -> Config:
    """The config of classifiers, which ``what`` names.

    Raises:
        UserError: it is of others.
    """
    if not isinstance(config, Config):
        trained = "detectors" if isinstance(config, DetectionConfig) else "heads alone"
        raise UserError(f"{what} trains {trained}; this is for classifiers")
    return config


def config_from(*layers: Any) -> RunConfig:
    """A checked config from mappings, such as a recipe or the config that a run wrote down; later ones win.

    Their ``task`` says of what: classification, the default, detection or scaling. A single value stands for a list of
    one.
    """
    given = [cast(DictConfig, OmegaConf.create(layer)) for layer in layers]
    task = ["classification", *(str(layer.pop("task")) for layer in given if "task" in layer)][-1]
    if task not in _TASKS:
        raise unknown("task", task, _TASKS)
    schema, check = _TASKS[task]
    default = schema()
    sections = {f.name for f in fields(default) if is_dataclass(getattr(default, f.name))}
    known = flatten(asdict(default))
    for layer in given:
        for key, value in flatten(OmegaConf.to_container(layer)).items():
            if key in sections:
                raise UserError(
                    f"{key}={value}: {key} is a section; set one of its keys, such as {_example(key, known)}"
                )
            if key not in known:
                raise unknown("key", key, known)
            if isinstance(known[key], list):
                OmegaConf.update(layer, key, _listed(key, value, known[key]))
            elif key in PATHS and isinstance(value, str):
                OmegaConf.update(layer, key, os.path.expanduser(value))
    try:
        config = cast(RunConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *given)))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'config'}: {_first_line(error)}") from error
    _check(config)
    check(config)
    return config


def parse_overrides(overrides: Sequence[str]) -> DictConfig:
    """``["train.epochs=5"]`` as a nested mapping.

    Raises:
        UserError: an argument is not of the form ``key=value``, or sets a part of what has none.
    """
    for item in overrides:
        if not item.partition("=")[0] or "=" not in item:
            raise UserError(f"expected key=value, got {item!r}")
    try:
        given = OmegaConf.from_dotlist(list(overrides))
    except (YAMLError, OmegaConfBaseException, ValueError, IndexError) as error:
        raise UserError(f"cannot read {' '.join(overrides)}: {_first_line(error)}") from error
    for alias, key in ALIASES.items():
        if alias in given:
            given[key] = given.pop(alias)
    return given


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; lists are values."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys under which two configs would compute different things, as the user writes them."""
    a, b = flatten(old), flatten(new)
    changed = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)} - {*NOT_PART_OF_A_RUN, *PLACES}
    # Another first stage is another training, the same by another path is not.
    first = [config.get("stage_one") and Path(config["stage_one"]).resolve() for config in (a, b)]
    return sorted(changed | ({"from"} if first[0] != first[1] else set()))


def origin(config: RunConfig, method: str, seed: int) -> dict[str, Any]:
    """What one training of a run computes, keys dotted: two of which it is the same are the same training."""
    computed = flatten(asdict(config)).items()
    left_out = (*NOT_PART_OF_A_RUN, *PLACES, "methods", "seeds")
    return {"method": method, "seed": seed, **{key: value for key, value in computed if key not in left_out}}


def _check(config: RunConfig) -> None:
    for key, value, bounds in _numbers(config):
        low, high = bounds["low"], bounds["high"]
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            wanted = f"at least {low:g}" if math.isinf(high) else f"in {low:g} .. {high:g}"
            raise UserError(f"{key}={value} is out of range: it must be finite and {wanted}")
    for key, given, known in (
        ("precision", config.precision, ("fp32", "bf16", "fp16")),
        ("train.decay", config.train.decay, ("cosine", "steps")),
    ):
        if given not in known:
            raise unknown(key, given, known)
    for key, values in (("methods", config.methods), ("seeds", config.seeds)):
        if not values or len(set(values)) != len(values):
            raise UserError(f"{key}={values} must be a non-empty list without repeats")
    if not all(0 < share < 1 for share in config.train.milestones):
        raise UserError(f"train.milestones={config.train.milestones} must be shares of the epochs, between 0 and 1")
    if not all(0 <= seed <= LARGEST_SEED for seed in config.seeds):
        raise UserError(f"seeds={config.seeds} must be in 0 .. {LARGEST_SEED}")


def _check_classifiers(config: Config) -> None:
    builder(config.model.name)
    named: list[tuple[str, str, Iterable[str]]] = [("data.name", config.data.name, DATASETS)]
    named += [("method", method, METHODS) for method in config.methods]
    named += [("data.format", config.data.format, ("torchvision", "folder"))]
    named += [("train.sampler", config.train.sampler, SAMPLERS)]
    for what, given, known in named:
        if given not in known:
            raise unknown(what, given, known)
    for method in config.methods:
        if isinstance(METHODS[method], SecondStage) != bool(config.stage_one):
            wanted = (
                "is a first stage" if config.stage_one else "is a second stage: from=RUN names the run of its first"
            )
            raise UserError(f"method {method} {wanted}, got from={config.stage_one or 'nothing'}")


_TASKS: dict[str, tuple[type[RunConfig], Callable[[Any], None]]] = {
    "classification": (Config, _check_classifiers),
    "detection": (DetectionConfig, check_detectors),
    "scaling": (ScalingConfig, check_scaling),
}


def _numbers(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            yield from _numbers(value, f"{prefix}{f.name}.")
        elif f.metadata:
            yield f"{prefix}{f.name}", value, f.metadata


def _example(section: str, known: Iterable[str]) -> str:
    return min(key for key in known if key.startswith(f"{section}."))


def _listed(key: str, value: Any, example: list[Any]) -> list[Any]:
    """``value`` where it is a list, or a list of it alone."""
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, list | dict) for item in items):
        raise UserError(f"{key} wants a list, such as {key}=[{','.join(map(str, example))}], got {value}")
    return items


def _problem(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())
