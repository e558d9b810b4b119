"""Heads in threads, of Python and of torch: whatever runs beside, the bits are those of one thread."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from concurrency_tools import assert_same_bits, batch, head_of, torch_threads
from conftest import FUSED, needs_core
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tde_kernels import FusedTDEHead, backends, use_backend
from tde_kernels import functional as F
from tde_kernels.backends import cpu

T = TypeVar("T")
THREADS = 4
HAS_CORE = ("cpu", "cpu") in FUSED


@pytest.fixture(autouse=True)
def in_turns() -> Iterator[None]:
    """Python threads take turns as often as they can, each on several of OpenMP's."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with torch_threads(2):
        yield
    sys.setswitchinterval(interval)


def at_once(run: Callable[[int], T], number: int = THREADS) -> list[T]:
    """``run`` of 0 to ``number - 1``, in a thread each, which start together."""
    ready = threading.Barrier(number)

    def wait_and_run(index: int) -> T:
        ready.wait(30)
        return run(index)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(wait_and_run, range(number)))


def one_by_one(run: Callable[[int], T], number: int = THREADS) -> list[T]:
    return [run(index) for index in range(number)]


def test_a_shared_head_in_evaluation(cpu_backend: str) -> None:
    head = head_of(cpu_backend).eval()

    def evaluate(index: int) -> list[Tensor]:
        x, y = batch(index)
        found = []
        for _ in range(2):
            found += [
                head(x),
                head(x, alpha=0.5),
                *head.predict(x, 3),
                head.alpha_sweep(x, [0.0, 1.0]),
                head.loss(x, y),
            ]
        return found

    assert_same_bits(at_once(evaluate), one_by_one(evaluate))


def test_a_head_per_thread_in_training(cpu_backend: str) -> None:
    def train(index: int) -> list[Tensor]:
        x, y = batch(index)
        head = head_of(cpu_backend, seed=index)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for step in range(3):
            loss = head.loss(x, y) if step % 2 else head(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, head.weight.detach(), head.ema, head.num_updates]

    assert_same_bits(at_once(train), one_by_one(train))


def test_one_head_trained_from_threads_that_take_turns(cpu_backend: str) -> None:
    """Losses and gradients are a thread's own; the average, as a batch norm's, is for one thread at a time."""
    steps = 3

    def train(head: FusedTDEHead) -> Callable[[int], list[Tensor]]:
        turn = threading.Lock()

        def run(index: int) -> list[Tensor]:
            x, y = batch(index)
            found: list[Tensor] = []
            for _ in range(steps):
                with turn:
                    loss = head.loss(x, y)
                found += [loss.detach(), *torch.autograd.grad(loss, [head.weight])]
            return found

        return run

    together, alone = head_of(cpu_backend, momentum=1.0), head_of(cpu_backend, momentum=1.0)
    assert_same_bits(at_once(train(together)), one_by_one(train(alone)))
    assert together.num_updates == alone.num_updates == 1 + steps * THREADS
    means = sum(batch(index)[0].double().mean(0) for index in (99, *list(range(THREADS)) * steps))
    for head in (together, alone):
        torch.testing.assert_close(head.ema.double(), means, rtol=1e-5, atol=1e-5)


def replicas_of(head: FusedTDEHead, number: int) -> list[FusedTDEHead]:
    """As DataParallel makes them: weights are no leaves, buffers are copies, but the first one's are the head's own."""
    found = []
    for index in range(number):
        replica = head._replicate_for_data_parallel()
        for name, parameter in head._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.clone())
        for name, buffer in head._buffers.items():
            setattr(replica, name, buffer if index == 0 else buffer.clone())
        found.append(replica)
    return found


def test_replicas_in_threads(cpu_backend: str) -> None:
    """Two, whose gradients add up to the same in either order; the average takes in what the first one sees."""
    heads, grads = [head_of(cpu_backend) for _ in range(2)], []
    for head, run in zip(heads, (at_once, one_by_one), strict=True):
        replicas = replicas_of(head, 2)
        losses = run(lambda index, replicas=replicas: replicas[index].loss(*batch(index)), 2)
        torch.stack(losses).mean().backward()
        assert head.weight.grad is not None
        grads.append([*losses, head.weight.grad, head.ema])
    assert_same_bits(grads[:1], grads[1:])
    torch.testing.assert_close(heads[0].ema, 0.9 * head_of().ema + batch(0)[0].mean(0))
    x = torch.cat([batch(0)[0], batch(1)[0]])
    replicas = replicas_of(heads[0].eval(), 2)
    torch.testing.assert_close(torch.cat(at_once(lambda index: replicas[index](batch(index)[0]), 2)), heads[0](x))


def test_contexts_of_threads_leave_no_backend_behind() -> None:
    """Whatever the order in which they end; and one that is left is in force no more."""
    entered, left = threading.Barrier(2), threading.Event()

    def first() -> None:
        with use_backend("reference"):
            entered.wait(10)
        left.set()

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    with use_backend("reference"):
        assert left.wait(10)
        assert backends.select("logits", torch.device("cpu"), torch.float32, None) == "reference"
    thread.join()
    usual = "cpu" if HAS_CORE else "reference"
    assert backends.select("logits", torch.device("cpu"), torch.float32, None) == usual
    if HAS_CORE:
        with use_backend("reference"), use_backend("cpu"):
            with use_backend("reference"):
                pass
            assert backends.select("logits", torch.device("cpu"), torch.float32, None) == "cpu"

    def switch(index: int) -> None:
        for _ in range(200):
            with use_backend("reference"):
                assert backends.select("logits", torch.device("cpu"), torch.float64, None) == "reference"

    at_once(switch)
    assert backends.select("logits", torch.device("cpu"), torch.float32, None) == usual


@needs_core
def test_any_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed between calls, and another in each thread: of all that the core computes by itself."""
    monkeypatch.setattr(cpu, "plan", "small")
    head = head_of("cpu")
    x, _ = batch(0)

    def compute() -> list[Tensor]:
        features = x.clone().requires_grad_()
        logits = F.grouped_logits(features, head.weight, num_heads=2, tau=16.0, backend="cpu")
        grads = torch.autograd.grad(logits, [features, head.weight], torch.ones_like(logits))
        return [logits.detach(), *grads, F.feature_sum(x, backend="cpu"), head.head_direction]

    with torch_threads(1):
        want = compute()

    def on(threads: int) -> list[Tensor]:
        with torch_threads(threads):  # asks how many there are first: then torch sets it to what others have asked for
            assert torch.get_num_threads() == threads
            return compute()

    numbers = [1, 2, 3, 8]
    assert_same_bits([on(threads) for threads in numbers], [want] * len(numbers))
    assert_same_bits(at_once(lambda index: on(numbers[index])), [want] * THREADS)


def test_checkpoints_and_hooks_in_threads(cpu_backend: str) -> None:
    """A forward within a backward, where activations are computed again and where a hook asks another head."""
    judge = head_of(cpu_backend, seed=1).eval()

    def train(index: int) -> list[Tensor]:
        head = head_of(cpu_backend)
        x, asked = batch(index)[0].requires_grad_(), []
        logits = checkpoint(head, x, use_reentrant=bool(index % 2))
        logits.register_hook(lambda grad: asked.append(judge(x.detach()).detach()))
        logits.square().mean().backward()
        assert x.grad is not None and head.weight.grad is not None
        return [logits.detach(), x.grad, head.weight.grad, head.ema, head.num_updates, *asked]

    assert_same_bits(at_once(train), one_by_one(train))


class Forks(torch.nn.Module):
    """Asks a traced head for two batches at once, on threads of torch's own that are not Python's."""

    def __init__(self, traced: torch.nn.Module) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        first, second = torch.jit.fork(self.traced, a), torch.jit.fork(self.traced, b)
        return torch.jit.wait(first), torch.jit.wait(second)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_threads_of_torchs_own(cpu_backend: str) -> None:
    head = head_of(cpu_backend).eval()
    x, other = batch(0)[0], batch(1)[0]
    forks = torch.jit.script(Forks(torch.jit.trace(head, x, check_trace=False)))
    assert_same_bits([list(forks(x, other)) for _ in range(3)], [[head(x), head(other)]] * 3)


def test_asyncio(cpu_backend: str) -> None:
    head = head_of(cpu_backend).eval()

    async def serve() -> list[list[Tensor]]:
        return [[a] for a in await asyncio.gather(*(asyncio.to_thread(head, batch(i)[0]) for i in range(THREADS)))]

    assert_same_bits(asyncio.run(serve()), one_by_one(lambda index: [head(batch(index)[0])]))
