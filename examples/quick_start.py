"""Trains a linear classifier and a de-confounded head on top of the same small network, on long-tailed digits.

Expect TDE to lift the classes with few training images by some points, in every seed, and to take a little from those
with many.
"""

from __future__ import annotations

import argparse

import torch
from long_tail import Table, digits, small_network, train
from torch import nn
from torch.nn.functional import cross_entropy

from tde_kernels import FusedTDEHead

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--seeds", type=int, default=3)
arguments = parser.parse_args()
table = Table()


def compare(seed: int) -> None:
    """One seed: both networks trained, and their test images classified."""
    data = digits(seed)

    torch.manual_seed(seed)
    linear = nn.Sequential(small_network(), nn.Linear(64, 10))
    train(linear.parameters(), lambda x, y: cross_entropy(linear(x), y), data.train, arguments.epochs)
    linear.eval()
    with torch.no_grad():
        table.add("linear", linear(data.test.images).argmax(-1), data.test.labels, data.counts)

    torch.manual_seed(seed)
    network, head = small_network(), FusedTDEHead(64, 10)  # K = 2, tau = 16, gamma = 1/32
    both = nn.ModuleList([network, head])
    train(both.parameters(), lambda x, y: head.loss(network(x), y), data.train, arguments.epochs)
    both.eval()
    with torch.no_grad():
        head.choose_alpha(network(data.val.images), data.val.labels)  # never by test images
        features = network(data.test.images)
        table.add("de-confounded", head(features, alpha=0.0).argmax(-1), data.test.labels, data.counts)
        table.add("de-confounded + TDE", head(features).argmax(-1), data.test.labels, data.counts)


for seed in range(arguments.seeds):
    compare(seed)
table.show()
