"""ResNet-32: its size, its shortcuts, its branches; networks of collections without their classifier."""

from __future__ import annotations

import re

import pytest
import torch
from tde_trainer.config import load_config
from tde_trainer.errors import UserError
from tde_trainer.models import MODELS, builder
from tde_trainer.models.resnet_cifar import BasicBlock, ResNetCifar
from tde_trainer.network import build_network
from tde_trainer.schema import ModelConfig
from torch import Tensor, nn

PUBLISHED = 464_154 - 10 * 64 - 10  # of the network for CIFAR-10, less its classifier


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_it_has_464_thousand_parameters() -> None:
    assert parameters(ResNetCifar(3, 1)) == PUBLISHED == 463_504


def test_it_has_31_convolutions_and_a_classifier() -> None:
    network = build_network(load_config("cifar10_lt"), "linear", 3, 10)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 31 and network.head.weight.shape == (10, 64)
    assert all(c.kernel_size == (3, 3) and c.bias is None for c in convolutions)
    assert [c.out_channels for c in convolutions] == [16] * 11 + [32] * 10 + [64] * 10
    assert [index for index, c in enumerate(convolutions) if c.stride == (2, 2)] == [11, 21]


@pytest.mark.parametrize(("branches", "features"), [(1, 64), (2, 128)])
def test_every_branch_adds_64_features_and_one_block(branches: int, features: int) -> None:
    backbone = MODELS["resnet32"](ModelConfig(branches=branches), 3)
    images = torch.randn(3, 3, 32, 32)
    assert backbone.features == features and backbone.module(images).shape == (3, features)
    assert parameters(backbone.module) == PUBLISHED + (branches - 1) * parameters(BasicBlock(64, 64, 1))


def test_branches_share_everything_but_their_block() -> None:
    network = ResNetCifar(3, 2).eval()
    images = torch.randn(3, 3, 32, 32)
    first, second = network(images).chunk(2, 1)
    assert not torch.equal(first, second)
    network.branches[1].load_state_dict(network.branches[0].state_dict())
    again, copied = network(images).chunk(2, 1)
    assert torch.equal(first, again) and torch.equal(first, copied)


def test_features_are_means_over_8_by_8_positions() -> None:
    network = ResNetCifar(3, 1).eval()
    images = torch.randn(2, 3, 32, 32)
    grid = network.branches[0](network.trunk(network.stem(images)))
    assert grid.shape == (2, 64, 8, 8) and (grid >= 0).all()
    torch.testing.assert_close(network(images), grid.flatten(2).mean(2))


@pytest.mark.parametrize("size", [8, 31, 64])
def test_it_reads_images_of_other_sizes(size: int) -> None:
    assert ResNetCifar(3, 1).eval()(torch.randn(2, 3, size, size)).shape == (2, 64)


def shortcut(x: Tensor, channels: int, stride: int) -> Tensor:
    """Every ``stride``-th pixel, between channels of zeros ("option A")."""
    batch, before, height, width = x.shape
    out = torch.zeros(batch, channels, -(-height // stride), -(-width // stride))
    for channel in range(before):
        for y in range(out.shape[2]):
            for z in range(out.shape[3]):
                out[:, (channels - before) // 2 + channel, y, z] = x[:, channel, y * stride, z * stride]
    return out


@pytest.mark.parametrize(("before", "after", "stride"), [(16, 16, 1), (16, 32, 2), (32, 64, 2), (4, 8, 2)])
@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_a_block_that_adds_nothing_is_its_shortcut(before: int, after: int, stride: int, size: tuple[int, int]) -> None:
    block = BasicBlock(before, after, stride)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, before, *size)
    for training in (True, False):
        assert torch.equal(block.train(training)(x), shortcut(x, after, stride).relu())


def test_a_block_is_two_convolutions_and_its_shortcut() -> None:
    block = BasicBlock(4, 8, 2).eval()
    x = torch.randn(2, 4, 6, 6)
    inner = block.bn1(block.conv1(x)).relu()
    torch.testing.assert_close(block(x), (block.bn2(block.conv2(inner)) + shortcut(x, 8, 2)).relu())


def test_weights_start_as_kaiming_has_it() -> None:
    for module in ResNetCifar(3, 1).modules():
        if isinstance(module, nn.Conv2d):
            fan_in = 9 * module.in_channels
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.15)
            assert abs(module.weight.mean().item()) < 5 * (2 / fan_in / module.weight.numel()) ** 0.5


OWN = ("resnet32", "small_conv")  # for images of a few pixels; the others are for photographs


@pytest.mark.parametrize("name", [*OWN, "resnet10"])
def test_gradients_reach_every_parameter(name: str) -> None:
    backbone = builder(name)(ModelConfig(width=4, features=8), 3)
    size = 8 if name in OWN else 64
    features = backbone.module(torch.randn(4, 3, size, size))
    (features * torch.randn_like(features)).sum().backward()
    gradients = [parameter.grad for parameter in backbone.module.parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", [*OWN, "timm:resnet10t"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_backbone_reads_grey_and_coloured_images(name: str, channels: int) -> None:
    module, features = builder(name)(ModelConfig(name), channels)
    assert module.eval()(torch.randn(2, channels, 32, 32)).shape == (2, features)


# Parameters as published, with a classifier for 1,000 classes and its bias
WHOLE = {
    "resnet18": (11_689_512, 512),
    "resnet50": (25_557_032, 2048),
    "resnet101": (44_549_160, 2048),
    "resnet152": (60_192_808, 2048),
    "resnext50_32x4d": (25_028_904, 2048),
    "resnext101_32x4d": (44_177_704, 2048),
    "torchvision:mobilenet_v3_small": (2_542_856, 1024),
    "timm:resnet18": (11_689_512, 512),
}


@pytest.mark.parametrize("name", list(WHOLE))
def test_networks_for_photographs_are_the_published_ones_without_their_classifier(name: str) -> None:
    with torch.device("meta"):
        module, features = builder(name)(ModelConfig(name), 3)
    published, wanted = WHOLE[name]
    assert features == wanted and parameters(module) == published - 1000 * (features + 1)


def test_resnet10_has_a_block_a_stage() -> None:
    module, features = builder("resnet10")(ModelConfig("resnet10"), 3)
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    assert features == 512 and len([c for c in convolutions if c.kernel_size != (1, 1)]) == 9
    assert module(torch.randn(2, 3, 48, 48)).shape == (2, 512)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet500", "unknown model.name 'resnet500'; did you mean 'resnet50'?"),
        ("mymodels:net", "unknown model.name 'mymodels:net'"),
        ("timm:resnet1", "unknown network of timm 'resnet1'; did you mean 'resnet18'?"),
        ("torchvision:resnet5", "unknown network of torchvision 'resnet5'; did you mean 'resnet50'?"),
        ("torchvision:squeezenet1_1", "model.name=torchvision:squeezenet1_1: model must hold an nn.Linear"),
    ],
)
def test_names_that_are_none_and_networks_without_a_linear_classifier(name: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        builder(name)(ModelConfig(name), 3)


@pytest.mark.parametrize("name", ["resnet10", "torchvision:resnet18"])
def test_networks_for_photographs_refuse_grey_images(name: str) -> None:
    with pytest.raises(UserError, match=f"model.name={name} is for images of 3 channels, got 1"):
        builder(name)(ModelConfig(name), 1)


def test_the_format_in_memory_changes_no_feature() -> None:
    module, _ = builder("resnet10")(ModelConfig("resnet10"), 3)
    images = torch.randn(2, 3, 32, 32)
    before = module.eval()(images)
    torch.testing.assert_close(module.to(memory_format=torch.channels_last)(images), before)
