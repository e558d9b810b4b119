"""All that a training needs to go on: tensors only, so that loading one can run no code.

There is no random state to keep, because every epoch seeds itself (see `epochs.seed_epoch`), and no scheduler state,
because the learning rate is a function of the step.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from tde_trainer.errors import UserError
from tde_trainer.files import write_atomic

FILE = "checkpoint.pt"


@dataclass(frozen=True)
class Progress:
    """How far a training has come."""

    seed: int
    epochs_done: int = 0
    seconds: float = 0.0  # wall time spent so far, over all resumptions


def save(
    directory: Path, network: nn.Module, optimizer: Optimizer, progress: Progress, scaler: GradScaler | None = None
) -> None:
    """Write weights, EMA, momentum buffers, the loss scale of fp16 and progress together, atomically."""
    scaling = scaler.state_dict() if scaler else {}
    content = {
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
    directory: Path, network: nn.Module, optimizer: Optimizer | None = None, scaler: GradScaler | None = None
) -> Progress:
    """Load weights and EMA, the optimizer's momentum buffers if one is given, and the loss scale of fp16 likewise.

    Raises:
        UserError: the checkpoint is missing, corrupt, or of another network.
    """
    path = directory / FILE
    content = _read(path)
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
        raise UserError(f"checkpoint {path} does not fit this run: {_one_line(error)}") from error


def load_part(directory: Path, name: str, module: nn.Module) -> None:
    """Load one part of the network, such as its ``head``.

    Raises:
        UserError: the checkpoint is missing, corrupt, or of another network.
    """
    path, prefix = directory / FILE, f"{name}."
    try:
        state = _read(path)["network"]
        module.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"checkpoint {path} does not fit this run: {_one_line(error)}") from error


def fingerprint(directory: Path) -> str:
    """Hash of the checkpoint's bytes; empty where there is none."""
    path = directory / FILE
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} is corrupt: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    # Torch follows its first sentence with pages of advice; an EOFError has no text at all.
    return " ".join(str(error).split())[:200] or type(error).__name__
