"""Any head, after any training: its copies and what is saved of it are the head, to the last bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from drawn import examples, same_bits
from hypothesis import given
from hypothesis import strategies as st
from oracle import NORMALIZERS
from torch import Tensor

from tde_kernels import ClassParallelTDEHead, FusedTDEHead
from tde_kernels import functional as F

Head = FusedTDEHead
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def saved(value: Any, **options: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


def anew(head: Head) -> Head:
    """A head constructed in the same way, with nothing of it."""
    family = {name: getattr(head, name) for name in ("num_heads", "tau", "gamma", "normalizer", "exponent", "momentum")}
    dtype = head.weight.dtype
    return type(head)(head.in_features, head.num_classes, **family, background_index=head.background_index, dtype=dtype)


def loaded(head: Head, **options: Any) -> Head:
    other = anew(head)
    other.load_state_dict(saved(head.state_dict(), weights_only=True), **options)
    return other


def on_meta(head: Head) -> Head:
    with torch.device("meta"):
        other = anew(head)
    other.load_state_dict(saved(head.state_dict(), weights_only=True), assign=True)
    return other


COPIES: dict[str, Callable[[Head], Head]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda head: pickle.loads(pickle.dumps(head)),
    "torch.save": lambda head: saved(head, weights_only=False),
    "state_dict": loaded,
    "assigned": lambda head: loaded(head, assign=True),
    "on meta": on_meta,
}


def step(head: Head, x: Tensor, mask: Tensor | None, how: str) -> tuple[Tensor, ...]:
    """A training step without an optimizer: result and gradients."""
    head.train()
    head.zero_grad()
    target = torch.arange(len(x)) % head.num_classes
    out = head.loss(x, target, mask=mask) if how == "loss" else head(x, mask=mask)
    out.float().square().mean().backward()
    return out, *(p.grad for p in head.parameters())


def everything(head: Head, x: Tensor) -> list[Tensor]:
    head.eval()
    with torch.no_grad():
        return [head(x), *head.predict(x, topk=1), head.head_direction, head.ema, head.num_updates, head.alpha]


@examples(15)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from([FusedTDEHead, ClassParallelTDEHead]),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 30), st.sampled_from([1, 2, 3])),
    normalizer=st.sampled_from(NORMALIZERS),
    dtype=st.sampled_from(DTYPES),
    background=st.booleans(),
    steps=st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.sampled_from(["loss", "logits"])), max_size=3),
    way=st.sampled_from(sorted(COPIES)),
    alpha=st.sampled_from([None, 0.0, 1.5]),
)
def test_copies(
    seed: int,
    kind: type[Head],
    sizes: tuple[int, int, int],
    normalizer: str,
    dtype: torch.dtype,
    background: bool,
    steps: list[tuple[int, bool, str]],
    way: str,
    alpha: float | None,
) -> None:
    torch.manual_seed(seed)
    width, classes, num_heads = sizes
    dim = width * num_heads
    head = kind(
        dim,
        classes,
        num_heads=num_heads,
        normalizer=normalizer,
        dtype=dtype,
        background_index=0 if background else None,
    )
    batches = [
        (torch.randn(rows, dim).to(dtype), torch.rand(rows) < 0.5 if masked else None, how)
        for rows, masked, how in steps
    ]
    for x, mask, how in batches:
        step(head, x, mask, how)
    if alpha is not None:
        head.alpha = alpha
    x = torch.randn(5, dim).to(dtype)
    other = COPIES[way](head)
    assert all(map(same_bits, everything(other, x), everything(head, x)))
    assert list(other.state_dict()) == list(head.state_dict())
    before = everything(head, x)
    for one, two in zip(step(other, x, None, "loss"), step(copy.deepcopy(head), x, None, "loss"), strict=True):
        assert same_bits(one, two), "it goes on otherwise"
    with torch.no_grad():
        other.weight.zero_()
        other.ema.fill_(7)
    assert all(map(same_bits, everything(head, x), before)), "a copy shares memory with the head"


@examples(8)
@given(
    seed=st.integers(0, 2**32 - 1),
    normalizer=st.sampled_from(NORMALIZERS),
    dtype=st.sampled_from(DTYPES),
    rows=st.lists(st.integers(0, 5), max_size=2).map(tuple),
    masked=st.booleans(),
)
def test_a_head_is_its_functions(
    seed: int, normalizer: str, dtype: torch.dtype, rows: tuple[int, ...], masked: bool
) -> None:
    """Training is Eq. 7 and the average, evaluation Eq. 8, in any dtype, for features of any leading shape."""
    torch.manual_seed(seed)
    head = FusedTDEHead(12, 7, num_heads=3, normalizer=normalizer, dtype=dtype)
    family = {
        "num_heads": 3,
        "tau": 16.0,
        "gamma": 1 / 32,
        "normalizer": normalizer,
        "class_scale": head.class_scale,
    }
    x, ema = torch.randn(*rows, 12).to(dtype), torch.zeros(12)
    mask = torch.rand(rows) < 0.5 if masked else None
    assert same_bits(head(x, mask=mask), F.grouped_logits(x, head.weight, **family))
    F.update_head_ema_(ema, x, momentum=0.9, mask=mask)
    torch.testing.assert_close(head.ema, ema)
    assert head.num_updates == int(len(x.reshape(-1, 12)) > 0 if mask is None else mask.any())
    want = F.tde_logits(x, head.weight, head.head_direction, alpha=3.0, **family)
    assert same_bits(head.eval()(x), want)
