"""Classes over processes: each holds the weights of some, and all find the numbers of one head.

    torchrun --nproc-per-node 2 examples/class_parallel.py

Ten digits stand in for the millions of classes that would need it. Expect the table of a head in one process.
"""

from __future__ import annotations

import argparse

import torch
from long_tail import Split, Table, digits, small_network, train
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tde_kernels import ClassParallelTDEHead

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()

distributed.init_process_group("gloo")  # "nccl" for GPUs
rank, size = distributed.get_rank(), distributed.get_world_size()
data = digits(arguments.seed)
torch.manual_seed(arguments.seed)  # alike on all ranks: the same network, and the same shuffling
network = DistributedDataParallel(small_network())
head = ClassParallelTDEHead(64, 10)  # outside of DistributedDataParallel: its gradients are complete
print(head)


def mine(rows: torch.Tensor) -> torch.Tensor:
    """This rank's part of ``rows``; all ranks have equally many."""
    return rows[: len(rows) // size * size][rank::size]


def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the whole batch and all classes, from features of this rank's images."""
    return head.loss(network(mine(images)), mine(labels))


parameters = [*network.parameters(), *head.parameters()]
whole = len(data.train.labels) // size * size
train(parameters, loss, Split(data.train.images[:whole], data.train.labels[:whole]), arguments.epochs)

network.eval()
head.eval()
table = Table()
with torch.no_grad():
    alphas = torch.linspace(0, 3, 31)
    alpha = head.choose_alpha(network(mine(data.val.images)), mine(data.val.labels), alphas)  # by all ranks' images
    for name, strength in (("without TDE", 0.0), (f"with TDE, alpha {alpha:.1f}", alpha)):
        logits = head(network(data.test.images), alpha=strength)  # [N, 10]: of all classes, on every rank
        table.add(name, logits.argmax(-1), data.test.labels, data.counts)
if rank == 0:
    table.show()
distributed.barrier()  # gloo's threads, which outlive the group, have let go of the last tensors before Python ends
distributed.destroy_process_group()
