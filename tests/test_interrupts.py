"""Signals and interrupts while a head trains: the process lives on, with an average that is whole."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
from concurrency_tools import batch, head_of

from tde_kernels import FusedTDEHead


def interrupted(run: Callable[[], object], line: int) -> bool:
    """Whether ``run`` is still under way when the package has executed that many lines, and then is interrupted."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal left
        if not frame.f_globals.get("__name__", "").startswith("tde_kernels"):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(True)  # an interrupt inside torch's own no_grad() leaves it off
        # One inside its autocast() leaves that entered: what it keeps of weights would be stale in every later training
        for _ in range(torch.autocast_increment_nesting()):
            torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
    return False


@pytest.mark.parametrize("way", ["loss", "logits"])
def test_an_interrupt_leaves_a_whole_average(way: str, cpu_backend: str) -> None:
    """At whatever line it strikes, ``ema`` and ``num_updates`` are those before the step or those after it."""
    x, y = (a[:8] for a in batch(0))

    def step(head: FusedTDEHead) -> None:
        (head.loss(x, y) if way == "loss" else head(x).sum()).backward()

    before, after = head_of(cpu_backend), head_of(cpu_backend)
    step(after)
    line, taken = 0, 0
    while True:
        head, line = head_of(cpu_backend), line + 1
        version = head.ema._version, head.num_updates._version
        struck = interrupted(partial(step, head), line)
        like = after if head.num_updates == after.num_updates else before
        assert torch.equal(head.ema, like.ema) and torch.equal(head.num_updates, like.num_updates)
        if like is after:  # autograd has seen the writes
            assert head.ema._version > version[0] and head.num_updates._version > version[1]
            taken += struck
        if not struck:
            break
    assert taken and line - taken > 100  # it struck on both sides of the update
    step(head)


LONG = """
import signal
import torch
from tde_kernels import FusedTDEHead
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
head = FusedTDEHead(128, 10_000)
x, y = torch.randn(512, 128), torch.randint(10_000, (512,))
head.loss(x, y).backward()
before = head.ema.clone()
print("ready", flush=True)
try:
    while True:
        head.loss(x, y).backward()
except KeyboardInterrupt:
    print("interrupted", flush=True)
while head.num_updates > 1:  # as many steps from the start give the average that was left
    before = 0.9 * before + x.mean(0)
    head.num_updates -= 1
torch.testing.assert_close(head.ema, before)
head.loss(x, y).backward()
print("lives", flush=True)
"""


def test_ctrl_c_in_a_long_step() -> None:
    """As a user sends it: from outside, to a process that computes on several threads."""
    command = [sys.executable, "-c", LONG]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        try:
            out, errors = process.communicate(timeout=600)
        finally:
            process.kill()  # one that has not ended would be waited for
    assert out.split() == ["interrupted", "lives"] and process.returncode == 0, errors[-3000:]


SIGNALS = """
import signal
import torch
from tde_kernels import FusedTDEHead
head = FusedTDEHead(128, 10_000)
x, y = torch.randn(512, 128), torch.randint(10_000, (512,))
def gradient():
    head.zero_grad()
    head.loss(x, y).backward()
    return head.weight.grad.clone()
before, seen = gradient(), []
signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
while len(seen) < 100:
    torch.testing.assert_close(gradient(), before)
signal.setitimer(signal.ITIMER_REAL, 0)
print("lives")
"""


def test_signals_while_products_run() -> None:
    """Where a library's product keeps numbers below the stack, their handlers write over it: torch 2.11's oneDNN."""
    done = subprocess.run([sys.executable, "-c", SIGNALS], capture_output=True, text=True, timeout=600)
    assert done.stdout == "lives\n" and done.returncode == 0, (done.returncode, done.stderr[-3000:])


@pytest.fixture
def handlers() -> Iterator[None]:
    """Leaves signals handled as they were."""
    numbers = (signal.SIGALRM, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_handlers_run_between_kernels(handlers: None) -> None:
    """A timer's, and that of a child which ends: while a head trains, which goes on as if nothing had been."""
    seen: list[int] = []
    head, twin = head_of(), head_of()
    for number in (signal.SIGALRM, signal.SIGCHLD):
        signal.signal(number, lambda number, _: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    child = subprocess.Popen(["true"])
    until = time.monotonic() + 20
    while time.monotonic() < until and not (signal.SIGCHLD in seen and seen.count(signal.SIGALRM) >= 5):
        head.loss(*batch(0)).backward()
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert child.wait() == 0 and signal.SIGCHLD in seen and seen.count(signal.SIGALRM) >= 5
    while twin.num_updates < head.num_updates:
        twin.loss(*batch(0)).backward()
    assert torch.equal(head.weight.grad, twin.weight.grad) and torch.equal(head.ema, twin.ema)
