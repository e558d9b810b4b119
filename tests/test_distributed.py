"""Two processes: every rank holds the EMA of the whole batch, however unequally the ranks share it."""

from __future__ import annotations

import copy
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from processes import device, gathered, start
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tde_kernels import FusedTDEHead, distributed, no_sync
from tde_kernels import functional as F

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
WORLD, D, C = 2, 12, 5


class Network(nn.Module):
    """A layer and a head; returns its loss."""

    def __init__(self, **head: Any) -> None:
        super().__init__()
        self.body = nn.Linear(D, D)
        self.head = FusedTDEHead(D, C, **head)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head.loss(self.body(x), y)


class LogitsNetwork(Network):
    """The same, by the logits."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.body(x)), y)


def batches(sizes: tuple[int, ...]) -> list[Tensor]:
    """The same on every rank: what each of them holds."""
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(size, D, generator=generator) + rank).to(device()) for rank, size in enumerate(sizes)]


def labels(x: Tensor) -> Tensor:
    return x[:, :C].argmax(-1)


def network(kind: type[Network] = Network) -> Network:
    torch.manual_seed(0)
    return kind().to(device())


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def alone(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    fully_shard(model.head)
    return fully_shard(model)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """What becomes of the feature sums, in order: sent, received."""
    events: list[str] = []
    all_reduce, receive = dist.all_reduce, distributed.PendingSum.receive

    def send(*args: object, **kwargs: object) -> object:
        events.append("sent")
        return all_reduce(*args, **kwargs)

    def wait(pending: distributed.PendingSum) -> object:
        if pending.under_way:
            events.append("received")
        return receive(pending)

    with mock.patch.object(dist, "all_reduce", send), mock.patch.object(distributed.PendingSum, "receive", wait):
        yield events


def check_ema(rank: int) -> None:
    for sizes in ((3, 40), (0, 7), (7, 0), (0, 0)):
        for backend in ("reference", None):
            parts = batches(sizes)
            head = FusedTDEHead(D, C, backend=backend)
            torch.nn.init.ones_(head.ema)
            head(parts[rank]).sum().backward()
            whole = torch.cat(parts)
            want = 0.9 * torch.ones(D) + whole.mean(0) if len(whole) else torch.ones(D)
            torch.testing.assert_close(head.ema, want)
            assert head.num_updates == (1 if len(whole) else 0)
            assert all(torch.equal(part, head.ema) for part in gathered(head.ema))
    parts = batches((20, 30))
    masks = [part[:, 0] > 0.5 for part in parts]
    alone = F.update_head_ema_(torch.zeros(D), parts[rank], momentum=0.9, mask=masks[rank])
    torch.testing.assert_close(alone, torch.cat([p[m] for p, m in zip(parts, masks, strict=True)]).mean(0))
    nothing = masks[rank] & (rank == 1)  # one rank's mask is all false
    one = F.update_head_ema_(torch.zeros(D), parts[rank], momentum=0.9, mask=nothing)
    torch.testing.assert_close(one, parts[1][masks[1]].mean(0))
    head = FusedTDEHead(D, C)
    head.loss(parts[rank], labels(parts[rank]), mask=nothing).backward()
    torch.testing.assert_close(head.ema, one)


def check_groups(rank: int) -> None:
    own = [dist.new_group([r]) for r in range(WORLD)][rank]
    parts = batches((3, 4))
    ema = F.update_head_ema_(torch.zeros(D), parts[rank], momentum=0.9, group=own)
    torch.testing.assert_close(ema, parts[rank].mean(0))


def check_fit_direction(rank: int) -> None:
    parts = batches((11, 30))
    head = FusedTDEHead(D, C).fit_direction(parts[rank].split(4))
    torch.testing.assert_close(head.ema, torch.cat(parts).mean(0))


def check_learning(rank: int) -> None:
    """Equal weights and averages after training on unequal data, and the loss falls."""
    torch.manual_seed(rank)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(D, D), nn.ReLU(), FusedTDEHead(D, C)))
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(rank))
    y = labels(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    head = model.module[2]
    assert head.num_updates == 30 and head.ema.any()
    for value in (head.ema, head.weight.detach()):
        assert all(torch.equal(part, value) for part in gathered(value))


def check_overlap(rank: int) -> None:
    """The sum travels during the backward; afterwards the buffer itself is up to date, whoever reads it."""
    x = batches((6,) * WORLD)[rank].requires_grad_()
    for kind in (Network, LogitsNetwork):
        for wrap in (alone, ddp, fsdp):
            model = network(kind)
            head, wrapped = model.head, wrap(model)
            with recorded() as events:
                loss = wrapped(x, labels(x))
                x.register_hook(lambda _, events=events: events.append("backward"))  # the last gradient of all
                assert events == ["sent"]
                loss.backward()
                assert events == ["sent", "backward", "received"], events
                assert head._buffers["num_updates"] == 1 and head._buffers["ema"].any()


def check_who_reads_waits(rank: int) -> None:
    """Between forward and backward too: nothing sees an average that lacks a batch."""
    x = batches((6,) * WORLD)[rank]
    want = torch.cat(batches((6,) * WORLD)).mean(0)

    def sent() -> FusedTDEHead:
        head = FusedTDEHead(D, C).to(device())
        head(x)
        assert head.pending_sum.under_way
        return head

    readers: list[Callable[[FusedTDEHead], Tensor]] = [
        lambda head: head.ema,
        lambda head: head.state_dict()["ema"],
        lambda head: copy.deepcopy(head)._buffers["ema"],
        lambda head: pickle.loads(pickle.dumps(head))._buffers["ema"],
        lambda head: head.double()._buffers["ema"],
        lambda head: (head.eval()(x), head._buffers["ema"])[1],
        lambda head: (head.predict(x, 1), head._buffers["ema"])[1],
    ]
    for read in readers:
        torch.testing.assert_close(read(sent()), want)
    head = sent()
    head.load_state_dict(FusedTDEHead(D, C).state_dict())
    assert not head.ema.any() and head.num_updates == 0  # loaded over, the batch does not come back
    head = sent()
    head.reset_parameters()
    assert not head.ema.any()
    with torch.no_grad():
        head(x)
    torch.testing.assert_close(head._buffers["ema"], want)
    head = sent()
    head(x)
    torch.testing.assert_close(head.ema, 1.9 * want)
    assert head.num_updates == 2


def check_accumulation(rank: int) -> None:
    """Steps that send no gradients send no sum; the average takes all of them in as one batch."""
    parts = batches((12,) * WORLD)
    x, y = parts[rank], labels(parts[rank])

    def own_no_sync(model: nn.Module) -> AbstractContextManager[None]:
        return model.no_sync()

    for wrap, quiet in ((ddp, own_no_sync), (ddp, no_sync), (fsdp, no_sync)):
        for kind in (Network, LogitsNetwork):
            single, inside = network(kind), network(kind)
            head, model = inside.head, wrap(inside)
            with mock.patch.object(distributed, "active", lambda: False):
                single(torch.cat(parts), labels(torch.cat(parts))).backward()
            with recorded() as events:
                for step, (x_part, y_part) in enumerate(zip(x.split(4), y.split(4), strict=True)):
                    with quiet(model) if step < 2 else nullcontext():
                        (model(x_part, y_part) / 3).backward()
                        assert len(events) == (2 if step == 2 else 0)
            torch.testing.assert_close(head.ema, single.head.ema)
            assert head.num_updates == 1
            for got, want in zip(inside.parameters(), single.parameters(), strict=True):
                torch.testing.assert_close(full(got.grad), want.grad)
            assert head.pending_sum.synchronised


def check_equals_one_process(rank: int) -> None:
    """Under every wrapper, compiled or not: as near to float64 as one process that holds all rows; alike to the bit."""
    parts = batches((8,) * WORLD)
    everything = torch.cat(parts)

    def train(model: nn.Module, inside: Network, x: Tensor, record: list[Tensor] | None = None) -> list[Tensor]:
        optimizer = torch.optim.SGD(inside.parameters(), lr=0.5)
        for _ in range(3):
            if record is not None:
                record.append(inside.body(x).mean(0).detach())
            optimizer.zero_grad()
            model(x, labels(x)).backward()
            optimizer.step()
        return [inside.head.ema, *(full(p).detach() for p in inside.parameters())]

    with mock.patch.object(distributed, "active", lambda: False):
        exact, means = network().double(), []
        _, *weights = train(exact, exact, everything.double(), means)
        oracle = [0.81 * means[0] + 0.9 * means[1] + means[2], *weights]
        rounded = train(single := network(), single, everything)
    errors = [(a - o).abs().max() for a, o in zip(rounded, oracle, strict=True)]
    wraps: dict[str, Callable[[Network], nn.Module]] = {
        "ddp": ddp,
        "fsdp": fsdp,
        "compiled, ddp": lambda model: ddp(compiled_inside(model)),
        "ddp, compiled": lambda model: torch.compile(ddp(model), backend="aot_eager"),
        "fsdp, compiled": lambda model: torch.compile(fsdp(model), backend="aot_eager"),
    }
    for name, wrap in wraps.items():
        torch.compiler.reset()
        inside = network()
        for got, want, error in zip(train(wrap(inside), inside, parts[rank]), oracle, errors, strict=True):
            assert (got - want).abs().max() <= 2 * error + 1e-6, name
            assert all(torch.equal(part, got) for part in gathered(got)), name
        assert inside.head.num_updates == 3, name


def compiled_inside(model: Network) -> Network:
    model.compile(fullgraph=True, backend="aot_eager")
    return model


def check_compiled_accumulation(rank: int) -> None:
    torch.compiler.reset()
    parts = batches((6,) * WORLD)
    x, y = parts[rank], labels(parts[rank])
    inside = network()
    want = inside.body(torch.cat(parts)).mean(0)
    model = ddp(compiled_inside(inside))
    for _ in range(2):
        with model.no_sync():
            model(x[:3], y[:3]).backward()
        assert not inside.head.ema.any()
        model(x[3:], y[3:]).backward()
        torch.testing.assert_close(inside.head.ema, want)
        assert inside.head.num_updates == 1
        inside.head.ema.zero_()
        inside.head.num_updates.zero_()


def check_several_uses(rank: int) -> None:
    """Two heads in a network; one head twice in a forward; one under checkpointing: each use is one batch."""
    parts = batches((6,) * WORLD)
    x, want = parts[rank], torch.cat(parts).mean(0)
    heads = nn.ModuleList([FusedTDEHead(D, C), FusedTDEHead(D, C + 1)])
    with recorded() as events:
        sum(head(x).sum() for head in heads).backward()
    assert events == ["sent", "sent", "received", "received"]
    for head in heads:
        torch.testing.assert_close(head._buffers["ema"], want)
    head = FusedTDEHead(D, C)
    (head(x).sum() + head(x + 1).sum()).backward()
    torch.testing.assert_close(head._buffers["ema"], 0.9 * want + (want + 1))
    for reentrant in (False, True):
        head = FusedTDEHead(D, C)
        with recorded() as events:
            checkpoint(head, x.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
        assert events == ["sent", "received"] and head.num_updates == 1


def check_sharded(rank: int) -> None:
    """``fully_shard``: made without memory, methods other than forward, and a clear error where nothing can gather."""
    parts = batches((6,) * WORLD)
    x, y = parts[rank], labels(parts[rank])
    with torch.device("meta"):
        model = Network(alpha=2.5)
    fsdp(model).to_empty(device=device())
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    head = model.head
    assert head.alpha == 2.5 and not head.ema.any() and full(head.weight).abs().sum() > 0
    model(x, y).backward()
    head.loss(x, y).backward()
    assert isinstance(head.weight, DTensor) and head.num_updates == 2
    assert isinstance(model.state_dict()["head.weight"], DTensor) and type(model.state_dict()["head.ema"]) is Tensor
    plain = FusedTDEHead(D, C).to(device())
    plain.load_state_dict({name: full(value) for name, value in head.state_dict().items()})
    for got, want in zip(head.eval().predict(x, 2), plain.eval().predict(x, 2), strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(head.alpha_sweep(x, [0.0, 1.0]), plain.alpha_sweep(x, [0.0, 1.0]))
    head.choose_alpha(x, y)

    inside = network()
    fully_shard(inside)
    for use in (lambda: inside.head.loss(x, y), lambda: inside.head(x), lambda: inside.head.predict(x, 1)):
        with pytest.raises(ValueError, match="fully_shard"):
            use()


def check_killed(rank: int) -> None:
    """The last check: a rank ends in the middle of a step, the other gets an error and does not hang."""
    head = FusedTDEHead(D, C)
    x = torch.ones(3, D)
    head(x).sum().backward()
    if rank == 1:
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        head(x).sum().backward()
    assert time.monotonic() - began < 20
    assert not head.pending_sum.under_way and head.num_updates == 1


CHECKS = (
    check_ema,
    check_groups,
    check_fit_direction,
    check_learning,
    check_overlap,
    check_who_reads_waits,
    check_accumulation,
    check_equals_one_process,
    check_compiled_accumulation,
    check_several_uses,
    check_sharded,
    check_killed,
)


def test_two_processes() -> None:
    start("gloo", WORLD, CHECKS)


@pytest.mark.gpu
def test_nccl() -> None:
    checks = (check_overlap, check_who_reads_waits, check_accumulation, check_equals_one_process, check_sharded)
    start("nccl", min(WORLD, torch.cuda.device_count()), checks)
