"""Checkpoints as a version writes them, with what they predict: ``python tests/golden/checkpoints.py FOLDER``.

By itself it runs with versions older than the record, which had neither all heads nor all ops.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tde_trainer import checkpoint
from tde_trainer.checkpoint import Progress
from torch import Tensor, nn

import tde_kernels
from tde_kernels import FusedTDEHead

DIM, CLASSES = 24, 11
# A training of seconds whose network is small
RUN = [
    "digits_lt",
    "train.epochs=12",
    "train.batch_size=32",
    "model.width=6",
    "model.features=16",
    "head.alpha_steps=7",
]


def features() -> Tensor:
    """``[9, D]`` multiples of 1/64."""
    place = torch.arange(9 * DIM)
    return ((place * 7919 % 127) - 40).float().reshape(9, DIM) / 64


class Small(nn.Module):
    """What the trainer's checkpoints hold, as small as can be."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(DIM, DIM)
        self.head = FusedTDEHead(DIM, CLASSES, num_heads=3, alpha=1.5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(x))
        return logits


def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)


def heads() -> dict[str, FusedTDEHead]:
    """Freshly made ones, of every form that a state_dict takes, by the names of their files."""
    made = {
        "head": FusedTDEHead(DIM, CLASSES, num_heads=3, alpha=1.5),
        "head_lws": FusedTDEHead(DIM, CLASSES, num_heads=2, normalizer="lws", tau=1.0),
        "head_background": FusedTDEHead(DIM, CLASSES, background_index=-1, momentum=0.5),
    }
    if hasattr(tde_kernels, "ClassParallelTDEHead"):
        made["head_class_parallel"] = tde_kernels.ClassParallelTDEHead(DIM, CLASSES, num_heads=3, alpha=1.5)
    return made


def predictions(network: nn.Module) -> dict[str, Tensor]:
    """Logits in training (Eq. 7) and in evaluation, which a checkpoint must bring back."""
    average = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.no_grad():
        found = {"evaluation": network.eval()(features()), "training": network.train()(features())}
        for name, buffer in network.named_buffers():
            buffer.copy_(average[name])  # as it was before that batch
    return found


def train(network: nn.Module, steps: int = 3) -> torch.optim.Optimizer:
    """So that momentum buffers, averages and counters are all there."""
    optimizer, target = optimizer_of(network), torch.arange(9) % CLASSES
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network.train()(features()), target).backward()
        optimizer.step()
    return optimizer


def write_checkpoints(folder: Path, *, trainer_run: bool = False) -> None:
    """Writes a file for each head, one of the published code's form, the trainer's, and what they predict."""
    torch.manual_seed(0)
    found: dict[str, Tensor] = {}
    for name, head in heads().items():
        train(head)
        torch.save(head.state_dict(), folder / f"{name}.pt")
        found |= {f"{name}/{key}": value for key, value in predictions(head).items()}
    published = FusedTDEHead(DIM, CLASSES, alpha=1.5)
    train(published)
    state = {"classifier": {"module.weight": published.weight.detach()}}
    torch.save({"state_dict_best": state, "embed": published.ema.numpy().tolist()}, folder / "published.pt")
    found |= {f"published/{key}": value for key, value in predictions(published).items()}
    network = Small()
    checkpoint.save(folder, network, train(network), Progress(seed=3, epochs_done=2, seconds=1.5))
    found |= {f"trainer/{key}": value for key, value in predictions(network).items()}
    save_file(found, folder / "predictions.safetensors")
    if trainer_run:
        command = [sys.executable, "-m", "tde_trainer", "train", *RUN, "methods=[deconfound]", "seeds=[0]", "out=run"]
        subprocess.run(command, check=True, cwd=folder, env={**os.environ, "TDE_BACKEND": "reference"})
        run = folder / "run"
        for path in [
            path for path in run.rglob("*") if path.is_file() and path.suffix not in (".json", ".jsonl", ".pt")
        ]:
            path.unlink()  # the report and its plots
        for empty in [path for path in run.rglob("*") if path.is_dir() and not any(path.iterdir())]:
            shutil.rmtree(empty)


if __name__ == "__main__":
    destination = Path(sys.argv[1])
    destination.mkdir(parents=True, exist_ok=True)
    write_checkpoints(destination)
