"""All that a training needs to go on: tensors only, so that loading one can run no code.

There is no random state to keep, because every epoch seeds itself (see `epochs.seed_epoch`), and no scheduler state,
because the learning rate is a function of the step.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from tde_trainer.errors import UserError
from tde_trainer.files import dumps, write_atomic
from tde_trainer.tensor_file import one_line, read_tensors

FILE = "checkpoint.pt"
FORMAT = 1  # raise it with every change after which older code would go wrong
Origin = Mapping[str, Any]  # what a training is of, see `config.origin`


@dataclass(frozen=True)
class Progress:
    """How far a training has come."""

    seed: int
    epochs_done: int = 0
    seconds: float = 0.0  # wall time spent so far, over all resumptions


def save(
    directory: Path,
    network: nn.Module,
    optimizer: Optimizer,
    progress: Progress,
    scaler: GradScaler | None = None,
    origin: Origin | None = None,
) -> None:
    """Write weights, EMA, momentum buffers, the loss scale of fp16, progress and origin together, atomically."""
    scaling = scaler.state_dict() if scaler else {}
    content = {
        "format": torch.tensor(FORMAT),
        "origin": torch.tensor(list(dumps(dict(origin or {})).encode()), dtype=torch.uint8),
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict()["state"],
        "scaler": {key: torch.tensor(value, dtype=torch.float64) for key, value in scaling.items()},
        "progress": {
            "seed": torch.tensor(progress.seed),
            "epochs_done": torch.tensor(progress.epochs_done),
            "seconds": torch.tensor(progress.seconds, dtype=torch.float64),
        },
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(directory / FILE, buffer.getvalue())


def load(
    directory: Path,
    network: nn.Module,
    optimizer: Optimizer | None = None,
    scaler: GradScaler | None = None,
    origin: Origin | None = None,
) -> Progress:
    """Load weights and EMA, the optimizer's momentum buffers if one is given, and the loss scale of fp16 likewise.

    Raises:
        UserError: the checkpoint is missing, corrupt, or of another network, training or version.
    """
    path = directory / FILE
    content = _read(path, origin)
    try:
        network.load_state_dict(content["network"])
        if optimizer is not None:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": content["optimizer"]})
        if scaler is not None:
            kept = {key: type(value)(content["scaler"][key].item()) for key, value in scaler.state_dict().items()}
            scaler.load_state_dict(kept)
        progress: dict[str, Tensor] = content["progress"]
        return Progress(
            int(progress["seed"].item()), int(progress["epochs_done"].item()), float(progress["seconds"].item())
        )
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"checkpoint {path} does not fit this run: {one_line(error)}") from error


def load_part(directory: Path, name: str, module: nn.Module, origin: Origin | None = None) -> None:
    """Load one part of the network, such as its ``head``.

    Raises:
        UserError: the checkpoint is missing, corrupt, or of another network, training or version.
    """
    path, prefix = directory / FILE, f"{name}."
    try:
        state = _read(path, origin)["network"]
        module.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"checkpoint {path} does not fit this run: {one_line(error)}") from error


def fingerprint(directory: Path) -> str:
    """Hash of the checkpoint's bytes; empty where there is none."""
    path = directory / FILE
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _read(path: Path, origin: Origin | None) -> Any:
    content = read_tensors(path)
    try:
        # The first versions wrote neither.
        written = int(content["format"]) if "format" in content else FORMAT
        found = json.loads(bytes(content["origin"].tolist())) if "origin" in content else {}
        other = sorted(key for key in found if origin is not None and origin.get(key) != found[key])
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"checkpoint {path} does not fit this run: {one_line(error)}") from error
    if written > FORMAT:
        raise UserError(f"checkpoint {path} is of a newer version: its format is {written}, known is {FORMAT}")
    if other:
        raise UserError(f"checkpoint {path} is of another training: what differs is {', '.join(other)}")
    return content
