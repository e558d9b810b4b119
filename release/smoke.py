"""What an installed wheel must do, run by an interpreter that knows nothing of the sources: ``python -I smoke.py``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

import tde_kernels
from tde_kernels import FusedTDEHead, reference
from tde_kernels import functional as F


def pools_of_threads() -> list[str]:
    """The OpenMP runtimes that this process has loaded, by path."""
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return sorted({found[0] for line in mapped if (found := re.search(r"/\S*/lib[gi]?omp[^/]*$", line))})


def head_and_loss() -> None:
    """Steps and TDE inference by the compiled core, against the definition in float64."""
    torch.manual_seed(0)
    head = FusedTDEHead(256, 1000, backend="cpu")
    x, target = torch.randn(512, 256), torch.randint(1000, (512,))
    losses = []
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss = head.loss(x, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0], losses
    weight, direction = head.weight.detach(), head.head_direction
    exact = reference.tde_logits(
        x.double(), weight.double(), direction.double(), alpha=3.0, num_heads=2, tau=16.0, gamma=1 / 32
    )
    found = head.eval()(x).detach()
    assert torch.allclose(found.double(), exact, atol=1e-4), (found - exact).abs().max()
    best = F.topk(x, weight, 5, direction=direction, alpha=3.0, num_heads=2, tau=16.0, gamma=1 / 32)[1]
    assert (best[:, 0] == found.argmax(-1)).all()


def main() -> None:
    where = Path(tde_kernels.__file__).parent
    assert where.is_relative_to(sys.prefix), f"{where} is not the wheel installed in {sys.prefix}"
    info = tde_kernels.info()
    head_and_loss()
    pools = pools_of_threads()
    assert len(pools) == 1, f"more than one pool of threads: {pools}"
    print(f"{', '.join(f'{k} {v}' for k, v in info.versions.items())}: right, one OpenMP ({pools[0]})")


main()
