"""An argument that is anything at all: refused by its name, or taken as the plain formula takes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from drawn import Untouched, examples
from hypothesis import given
from hypothesis import strategies as st
from test_checks import GOOD
from torch import Tensor

from tde_kernels import FusedTDEHead, reference
from tde_kernels import functional as F

OPTIONAL: dict[str, dict[str, Any]] = {
    "grouped_cross_entropy": {
        "class_weight": torch.ones(7),
        "logit_bias": torch.zeros(7),
        "margin": torch.ones(7),
        "label_smoothing": 0.1,
        "ignore_index": -1,
        "target_b": torch.tensor([6, 5, 4, 3, 2]),
        "lam": 0.5,
        "focal_exponent": 1.0,
        "reduction": "none",
    },
    "update_head_ema_": {"mask": torch.tensor([True, False, True, True, False])},
    "background_exempt": {"log": True},
}
CLASSIFIER = {"gamma": 0.1, "normalizer": "deconfound", "exponent": 1.0, "class_scale": None}
NUMBERS = st.one_of(
    st.sampled_from([None, True, 0, -1, 1, 2**63, 10**400, 1.5, 1e39, -1e300, math.nan, math.inf, -0.0, 1j, "2", ""]),
    st.sampled_from([np.float32(1.5), np.float64(1.5), np.int64(2), np.nan, np.ones(3)]),
    st.sampled_from([[], {}, (), b"x", object(), torch.float32, len]),
    st.integers(-(2**70), 2**70),
    st.floats(),
)


def _odd(seed: int, shape: tuple[int, ...], kind: str) -> Any:
    """A tensor that is wrong in some way, or right by chance."""
    torch.manual_seed(seed)
    a = torch.randn(shape)
    return {
        "float32": lambda: a,
        "float64": a.double,
        "bfloat16": a.bfloat16,
        "float8": lambda: a.to(torch.float8_e4m3fn),
        "int64": a.long,
        "int32": a.int,
        "bool": a.bool,
        "complex": lambda: torch.complex(a, a),
        "quantised": lambda: torch.quantize_per_tensor(a, 0.1, 0, torch.qint8),
        "sparse": lambda: a.to_sparse() if a.dim() else a,
        "csr": lambda: a.to_sparse_csr() if a.dim() == 2 else a,
        "mkldnn": lambda: a.to_mkldnn() if a.dim() else a,
        "nested": lambda: torch.nested.nested_tensor([a, a]),
        "jagged": lambda: torch.nested.nested_tensor([a, a], layout=torch.jagged) if a.dim() else a,
        "meta": lambda: a.to("meta"),
        "numpy": a.numpy,
        "list": a.tolist,
        "NaN": lambda: a * math.nan,
        "infinite": lambda: a * math.inf,
        "negative bit": lambda: torch._neg_view(a),
    }[kind]()


KINDS = (
    *("float32", "float64", "bfloat16", "float8", "int64", "int32", "bool", "complex", "quantised"),
    *("sparse", "csr", "mkldnn", "nested", "jagged", "meta", "numpy", "list", "NaN", "infinite", "negative bit"),
)
SHAPES = st.one_of(
    st.sampled_from(
        [(), (0,), (1,), (5,), (7,), (12,), (5, 12), (7, 12), (0, 12), (5, 0), (1, 1), (12, 5), (2, 5, 12)]
    ),
    st.lists(st.integers(0, 13), max_size=4).map(tuple),
)
TENSORS = st.builds(_odd, st.integers(0, 2**32 - 1), SHAPES, st.sampled_from(KINDS))
# What a message may call an argument besides its own name: that of which it has the wrong size or dtype
PARTNERS: Mapping[str, tuple[str, ...]] = {
    "x": ("w", "ema", "target", "direction", "mask", "num_heads"),
    "w": ("x", "num_heads", "target", "class_scale", "background_index", "k", "class_weight", "logit_bias", "margin"),
    "ema": ("x", "num_heads"),
    "normalizer": ("class_scale",),
    "ignore_index": ("target", "target_b"),
    "class_scale": ("normalizer",),
}


def in_memory(a: Any) -> bool:
    return type(a) is Tensor and a.layout == torch.strided and a.device.type == "cpu" and not a.is_nested


def outcome(module: Any, name: str, arguments: dict[str, Any]) -> Any:
    """What came, or the error of a kind that says what is wrong. An average is changed in a copy."""
    if in_memory(arguments.get("ema")):
        arguments = {**arguments, "ema": arguments["ema"].clone()}
    try:
        result = getattr(module, name)(**arguments)
    except (ValueError, TypeError) as error:
        return error
    return result


def assert_alike(got: Any, want: Any) -> None:
    got, want = ([a] if isinstance(a, Tensor) else list(a) for a in (got, want))
    for a, b in zip(got, want, strict=True):
        if a.dtype == torch.int64:
            assert a.shape == b.shape
        else:
            largest = max(1.0, float(b.double().nan_to_num(0, 0, 0).abs().amax()) if b.numel() else 1.0)
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * largest, equal_nan=True)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, str, dict[str, Any]]:
    """A function, one of its arguments, and all of them, that one being anything."""
    name = draw(st.sampled_from(sorted(GOOD)))
    good = {**(CLASSIFIER if "w" in GOOD[name] else {}), **OPTIONAL.get(name, {}), **GOOD[name]}
    argument = draw(st.sampled_from(sorted(good)))
    value = draw(st.one_of(NUMBERS, TENSORS))
    return name, argument, {**good, argument: value}


@examples(25)
@given(call=calls())
def test_functions(call: tuple[str, str, dict[str, Any]]) -> None:
    name, argument, arguments = call
    untouched = Untouched(*(a for a in arguments.values() if in_memory(a)))
    got = outcome(F, name, arguments)
    untouched.check()
    if isinstance(got, Exception):
        said = str(got)
        assert any(word in said for word in (argument, *PARTNERS.get(argument, ()))), f"{argument} is not named: {said}"
        assert "incompatible" not in said and "unsupported operand" not in said, said
    elif not any(isinstance(a, Tensor) and a.is_meta for a in (got if isinstance(got, tuple) else (got,))):
        assert_alike(got, outcome(reference, name, arguments))


HEAD = {
    "num_heads": 2,
    "tau": 16.0,
    "gamma": 1 / 32,
    "alpha": 3.0,
    "momentum": 0.9,
    "normalizer": "deconfound",
    "background_index": None,
    "exponent": 1.0,
    "backend": None,
    "dtype": None,
    "in_features": 12,
    "num_classes": 7,
}


@examples(7)
@given(argument=st.sampled_from(sorted(HEAD)), value=NUMBERS)
def test_heads(argument: str, value: Any) -> None:
    """A head that can be made can be used."""
    if argument in ("in_features", "num_classes") and isinstance(value, int) and value > 1000:
        return  # memory for so many is torch's to refuse
    try:
        head = FusedTDEHead(**{**HEAD, argument: value})
    except (ValueError, TypeError) as error:
        assert argument in str(error) or (argument == "in_features" and "num_heads" in str(error)), error
        return
    x = torch.randn(5, head.in_features, dtype=head.weight.dtype)
    head.loss(x, torch.zeros(5, dtype=torch.int64)).backward()
    assert head.eval()(x).shape == (5, head.num_classes)
    assert head.predict(x, topk=1)[1].shape == (5, 1)
