"""Heads in processes that were forked or spawned from one that has computed on several threads."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from concurrency_tools import BATCH, CLASSES, Predicted, assert_same_bits, batch, head_of, torch_threads
from conftest import needs_core
from torch.utils.data import DataLoader

from tde_kernels import FusedTDEHead
from tde_kernels import functional as F
from tde_kernels.backends import cpu


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    with torch_threads(2):
        yield


def predictions_of_workers(head: FusedTDEHead, start: str, workers: int) -> None:
    """A worker runs on one thread; its parent has used several, whose pool a forked child believes to have."""
    features = torch.stack([batch(index)[0] for index in range(4)])
    head(features)
    loader = DataLoader(
        Predicted(head, features), batch_size=None, num_workers=workers, multiprocessing_context=start, timeout=300
    )
    got = list(loader)
    with torch_threads(1), torch.no_grad():
        assert_same_bits([got], [[head(x) for x in features]])


def test_forked_workers(cpu_backend: str) -> None:
    predictions_of_workers(head_of(cpu_backend).eval(), "fork", 2)


def test_spawned_workers() -> None:
    predictions_of_workers(head_of().eval(), "spawn", 1)


@needs_core
def test_the_core_in_a_forked_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for several threads, of which none has come along, it computes on one instead of waiting for them."""
    monkeypatch.setattr(cpu, "plan", "small")
    # What torch would do on several threads is done before: it does wait
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    x, upstream = batch(0)[0], torch.ones(BATCH, CLASSES)
    w = head_of().weight.detach().requires_grad_()

    def compute() -> list[Any]:
        logits = F.grouped_logits(x, w, num_heads=2, tau=16.0, backend="cpu")
        grads = torch.autograd.grad(logits, [w], upstream)
        return [a.detach().numpy() for a in (logits, *grads, F.feature_sum(x, backend="cpu"))]

    def send(pipe: Connection) -> None:
        pipe.send((torch.get_num_threads(), compute()))

    want = compute()
    pipe, of_child = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=send, args=(of_child,))
    child.start()
    try:
        assert pipe.poll(30), "the forked process hangs"
        threads, got = pipe.recv()
    finally:
        child.kill()
        child.join()
    assert threads == 2
    assert all((a == b).all() for a, b in zip(got, want, strict=True))
