"""The head on a network of torchvision or timm: swap the last layer, train as before, evaluate at any alpha.

Expect TDE to lift the classes with few training images. Networks start from random weights unless --pretrained, which
downloads published ones.
"""

from __future__ import annotations

import argparse

import timm
import torch
import torchvision
from long_tail import Table, digits, train
from torch import nn
from torch.nn.functional import cross_entropy

from tde_kernels import FusedTDEHead, replace_head

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="timm:test_efficientnet", help="torchvision:NAME or timm:NAME")
parser.add_argument("--pretrained", action="store_true", help="begin with published weights, which are downloaded")
parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()


def build(model: str, pretrained: bool) -> nn.Module:
    """The network of that name, with the classifier it was published with."""
    collection, _, name = model.partition(":")
    if collection == "timm":
        return timm.create_model(name, pretrained=pretrained)
    return torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)


data = digits(arguments.seed, size=arguments.size, channels=3)
torch.manual_seed(arguments.seed)
model = replace_head(build(arguments.model, arguments.pretrained), num_classes=10)
(head,) = (module for module in model.modules() if isinstance(module, FusedTDEHead))
print(head)

# head(x) is Eq. 7 in training, so the loss is the one that the network had
train(model.parameters(), lambda x, y: cross_entropy(model(x), y), data.train, arguments.epochs, lr=arguments.lr)

model.eval()
features: list[torch.Tensor] = []  # what reaches the head
hook = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
with torch.no_grad():
    model(data.val.images), model(data.test.images)
hook.remove()
alpha = head.choose_alpha(features[0], data.val.labels)
table = Table()
for name, value in (("without TDE", 0.0), (f"with TDE, alpha {alpha:.2f}", alpha)):
    table.add(name, head(features[1], alpha=value).argmax(-1), data.test.labels, data.counts)
table.show()
