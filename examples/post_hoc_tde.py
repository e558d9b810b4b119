"""TDE for a linear classifier that is trained already: no gradient and no further training, features alone.

Expect a good part of what de-confounded training gives: the classes with few training images gain.
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
    """One seed: a network is trained, and TDE is put on top."""
    data = digits(seed)
    torch.manual_seed(seed)
    backbone, classifier = small_network(), nn.Linear(64, 10, bias=False)  # a bias would be dropped
    model = nn.Sequential(backbone, classifier)
    train(model.parameters(), lambda x, y: cross_entropy(model(x), y), data.train, arguments.epochs)

    # From here on the network is as somebody else left it
    model.eval()
    with torch.no_grad():
        val, test = backbone(data.val.images), backbone(data.test.images)
        head = FusedTDEHead.from_linear(classifier, normalizer="linear", num_heads=1, tau=1.0).eval()
        head.fit_direction(backbone(images) for images in data.train.images.split(64))  # the mean of the features
        alpha = head.choose_alpha(val, data.val.labels)
        starts, scores = head.alpha_curve(val, data.val.labels)  # scores[i] holds from starts[i] to the next
        print(
            f"seed {seed}: alpha {alpha:.2f}, the best of {len(starts)} intervals; accuracy on validation images "
            f"{scores[starts <= 0][-1]:.1%} without TDE, {scores.max():.1%} with it"
        )
        table.add("linear", classifier(test).argmax(-1), data.test.labels, data.counts)
        table.add("linear + TDE", head(test).argmax(-1), data.test.labels, data.counts)


for seed in range(arguments.seeds):
    compare(seed)
table.show()
