"""Data parallelism: the one collective the head needs, sum and count of the features over all ranks in one message.

The functional API waits for it. A head sends it in the forward and folds it into its average when the backward has
ended, so that it travels meanwhile: :class:`PendingSum`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Method = TypeVar("Method", bound=Callable[..., Any])


def active() -> bool:
    """Whether there are ranks to reduce over."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_dtensor(t: object) -> bool:
    """Whether this rank holds a part of ``t``."""
    if type(t) in (Tensor, nn.Parameter):  # as most are
        return False
    from torch.distributed.tensor import DTensor  # takes longer to import than the rest of the package

    return isinstance(t, DTensor)


def reduce_sum(total: Tensor, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """``total`` summed over the ranks of ``group`` (default: all), in place; itself where there is one process."""
    if active():
        torch.distributed.all_reduce(total, group=group)
    return total


class _Sent(NamedTuple):
    total: Tensor
    momentum: float
    work: torch.distributed.Work | None  # None: it has arrived


class PendingSum:
    """A head's feature sum ``[D + 1]`` between the forward that takes it and the average that takes it in.

    All ranks send in the order of their forwards, before their backwards send gradients: a group sees the same order
    everywhere.

    Attributes:
        synchronised: whether sums are sent; else they are kept, and go with the next that is.
    """

    def __init__(self) -> None:
        self.synchronised = True
        self._kept: Tensor | None = None
        self._sent: _Sent | None = None

    @property
    def under_way(self) -> bool:
        """Whether something was sent that nobody has received."""
        return self._sent is not None

    def add(self, total: Tensor, momentum: float, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Sends ``total``, and what was kept, to the ranks of ``group``; or keeps it. ``momentum`` goes along."""
        if self._kept is not None:
            total = total + self._kept.to(total.device)
        if not self.synchronised or _accumulates():
            self._kept = total
            return
        self._kept, work = None, None
        if torch.compiler.is_compiling():  # traces no asynchronous collective; the graph's compiler moves the wait
            torch.distributed.all_reduce(total, group=group)
        else:
            work = torch.distributed.all_reduce(total, group=group, async_op=True)
        self._sent = _Sent(total, momentum, work)

    def receive(self) -> tuple[Tensor, float] | None:
        """What was sent, summed over the ranks, and its momentum, once; None where nothing is under way.

        Raises:
            RuntimeError: a rank is gone.
        """
        sent, self._sent = self._sent, None
        if sent is None:
            return None
        if sent.work is not None:
            sent.work.wait()
        return sent.total, sent.momentum

    def forget(self) -> None:
        """Drops what was kept or sent."""
        self.receive()
        self._kept = None


def _accumulates() -> bool:
    """Whether this is the forward of a ``DistributedDataParallel`` under its ``no_sync``."""
    outer = DistributedDataParallel._get_active_ddp_module()
    return outer is not None and not outer.require_backward_grad_sync


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Accumulation: the ranks send neither gradients nor sums of features, until a step outside of this.

    Covers ``model`` and every ``DistributedDataParallel``, ``fully_shard`` and head within. The moving averages then
    take in the features of all steps since the last that was sent as one batch. Without a process group nothing is
    ever sent: each step is a batch of its own there, as without this.
    """
    from torch.distributed.fsdp import FSDPModule  # imports DTensor

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            pending = getattr(module, "pending_sum", None)
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(False, recurse=False)
                stack.callback(module.set_requires_gradient_sync, True, recurse=False)
            if isinstance(pending, PendingSum):
                stack.callback(setattr, pending, "synchronised", pending.synchronised)
                pending.synchronised = False
        yield


def like_forward(method: Method) -> Method:
    """A method of an ``FSDPModule`` that reads weights, which are gathered for it as for a forward."""

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_dtensor(self.weight):  # gathered already
            return method(self, *args, **kwargs)
        from torch.distributed.fsdp import register_fsdp_forward_method

        # From now on the module's method of this name. Not for torch.compile to trace
        torch.compiler.disable(register_fsdp_forward_method)(self, method.__name__)
        return getattr(self, method.__name__)(*args, **kwargs)

    return cast(Method, run)
