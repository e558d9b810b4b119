"""The folder of a run: made, gone on with or emptied, and owned by one trainer at a time."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tde_trainer import results
from tde_trainer.config import changed_keys, config_from
from tde_trainer.errors import UserError
from tde_trainer.files import dumps, is_partial, make_folder, write_atomic
from tde_trainer.ownership import owned
from tde_trainer.schema import RunConfig


@contextmanager
def run_folder(run: Path, config: RunConfig, command: Sequence[str]) -> Iterator[None]:
    """Own ``run`` inside the block, once it says with which config and command it was started.

    Raises:
        UserError: another trainer owns it; it is in use, and neither ``resume`` nor ``overwrite`` is set, or both are;
            it is no run, or one of another config; nothing may be written there.
    """
    if config.resume and config.overwrite:
        raise UserError("resume=true goes on and overwrite=true starts anew: give one of them")
    if run.exists() and not run.is_dir():
        raise UserError(f"out={run} is a file")
    try:
        make_folder(run)
    except OSError as error:
        raise UserError(f"cannot make {run}: {error.strerror or error}") from error
    with owned(run):
        _open(run, config, command)
        yield


def _open(run: Path, config: RunConfig, command: Sequence[str]) -> None:
    is_run = (run / results.SETTINGS).exists()
    if not all(map(is_partial, run.iterdir())):
        if not is_run:
            wanted = "overwriting it" if config.overwrite else "training there"
            raise UserError(f"{run} is not empty and is not a run (it has no {results.SETTINGS}): not {wanted}")
        if not (config.overwrite or config.resume):
            raise UserError(f"{run} is not empty: resume=true goes on with it, overwrite=true starts anew")
    settings: dict[str, Any] = {"config": asdict(config), "command": shlex.join(command)}
    if is_run and not config.overwrite:
        begun = results.settings(run)
        # Read as a config of today: keys that came since are at their defaults.
        changed = changed_keys(asdict(config_from(begun["config"])), settings["config"])
        if changed:
            raise UserError(f"cannot resume {run} with another config; changed: {', '.join(changed)}")
        settings["command"] = begun["command"]  # that began it, while the config says where things lie by now
        # What a trainer that was killed left unfinished
        _remove(run, [path for path in run.rglob(".*") if is_partial(path)])
    else:
        # It stays a run until it is another one: whoever is killed meanwhile can do the same again.
        _remove(run, [path for path in run.iterdir() if path.name != results.SETTINGS])
    write_atomic(run / results.SETTINGS, dumps(settings, indent=1) + "\n")


def _remove(run: Path, paths: Sequence[Path]) -> None:
    try:
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise UserError(f"cannot empty {run}: {error.filename}: {error.strerror}") from error
