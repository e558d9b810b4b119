"""What a training step really sends and holds: on CPUs, by gloo, under Linux."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import SGD, Adam
from torch.profiler import ProfilerActivity, profile

from tde_kernels import ClassParallelTDEHead
from tde_trainer.plan.model import DTYPES, Problem

# Where struct tcp_info of linux/tcp.h keeps tcpi_bytes_sent and tcpi_bytes_retrans, each a uint64
_SENT, _SENT_AGAIN, _END = 200, 208, 216


@dataclass(frozen=True)
class Measured:
    """Of one rank, in bytes."""

    forward: int  # sent
    backward: int  # sent
    memory: int  # the most that tensors took at a time


def measure(problem: Problem) -> Measured:
    """One training step of a head with random weights and features, after another. All ranks of the job call it.

    Args:
        problem: of as many ranks as the job has.
    """
    classes = problem.shards.ranks
    mesh = init_device_mesh("cpu", (problem.data_parallel, classes), mesh_dim_names=("data", "classes"))
    group = mesh if problem.data_parallel > 1 else mesh.get_group("classes")
    torch.manual_seed(dist.get_rank())
    dtype = DTYPES[problem.dtype]
    head = ClassParallelTDEHead(
        problem.dim,
        problem.classes,
        num_heads=problem.heads,
        dtype=dtype,
        sample_rate=problem.sample_rate,
        group=group,
    )
    x = torch.randn(problem.own_rows, problem.dim, dtype=dtype).requires_grad_()
    target, *more = torch.randint(problem.classes, (problem.targets, problem.own_rows))
    options = {"target_b": more[0], "lam": 0.3} if more else {}
    weights = head.parameters()
    optimizer = SGD(weights, 0.1, momentum=0.9) if problem.optimizer == "sgd" else Adam(weights, fused=True)

    def step() -> tuple[int, int]:
        """What has been sent when the loss is there, and at the end."""
        loss = head.loss(x, target, **options)
        dist.barrier()
        forward = sent()
        loss.backward()
        optimizer.step()
        dist.barrier()
        x.grad = None
        optimizer.zero_grad()
        return forward, sent()

    _, before = step()
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    held = sum(tensor.nbytes for tensor in (x, target, *head.parameters(), *states))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        forward, after = step()
    return Measured(forward - before, after - forward, held + _most(seen))


def sent() -> int:
    """Bytes that this process has sent over the TCP connections that it has open."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        if not link.is_socket():
            continue
        with socket.socket(fileno=os.dup(int(link.name))) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _END)
                total += _uint64(information, _SENT) - _uint64(information, _SENT_AGAIN)
    return total


def _uint64(information: bytes, place: int) -> int:
    return int.from_bytes(information[place : place + 8], sys.byteorder)


def _most(seen: profile) -> int:
    """The most bytes at a time of what was allocated under the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Ev Idx"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    )
    most = now = 0
    for *_, change in changes:
        now += change
        most = max(most, now)
    return most
