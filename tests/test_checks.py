"""Bad input: the right exception, and a message that names the argument, what came and what was wanted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tde_kernels import functional as F
from tde_kernels import reference

D, C = 12, 7
NAN, INF = float("nan"), float("inf")
X, W, Y = torch.randn(5, D), torch.randn(C, D), torch.tensor([0, 1, 2, 3, 6])
DIRECTION, EMA = torch.randn(D), torch.zeros(D)
FAMILY: dict[str, Any] = {"num_heads": 2, "tau": 16.0}
# Good arguments of every public function
GOOD: dict[str, dict[str, Any]] = {
    "grouped_logits": {"x": X, "w": W, **FAMILY},
    "tde_logits": {"x": X, "w": W, "direction": DIRECTION, "alpha": 1.0, **FAMILY},
    "update_head_ema_": {"ema": EMA, "x": X, "momentum": 0.9},
    "background_exempt": {"x": X, "w": W, "direction": DIRECTION, "alpha": 1.0, "background_index": 0, **FAMILY},
    "grouped_cross_entropy": {"x": X, "w": W, "target": Y, **FAMILY},
    "alpha_sweep": {"x": X, "w": W, "direction": DIRECTION, "alphas": [0.0, 1.0], **FAMILY},
    "alpha_segments": {"x": X, "w": W, "direction": DIRECTION, **FAMILY},
    "head_direction": {"ema": DIRECTION, "num_heads": 2},
    "topk": {"x": X, "w": W, "k": 2, "direction": DIRECTION, "alpha": 1.0, **FAMILY},
}
CLASSIFIERS = tuple(name for name, arguments in GOOD.items() if "w" in arguments)
COUNTERFACTUALS = tuple(name for name in CLASSIFIERS if "direction" in GOOD[name])
LOSS, EMA_ = ("grouped_cross_entropy",), ("update_head_ema_",)
META = torch.zeros(5, D, device="meta")
ALPHA = ("tde_logits", "background_exempt", "topk")


# functions, the arguments that are bad, exception, what its message says
BAD: list[tuple[tuple[str, ...], dict[str, Any], type[Exception], str]] = [
    (CLASSIFIERS, {"x": [1.0]}, TypeError, r"x must be a tensor, got list"),
    (CLASSIFIERS, {"w": None}, TypeError, r"w must be a tensor, got NoneType"),
    (CLASSIFIERS, {"x": X[:, :5]}, ValueError, r"x must have shape \[\.\.\., 12\], got \(5, 5\)"),
    (CLASSIFIERS, {"x": torch.tensor(1.0)}, ValueError, r"x must have shape \[\.\.\., 12\], got \(\)"),
    (CLASSIFIERS, {"x": X.long()}, TypeError, r"x must be one of float64, .*, got int64"),
    (CLASSIFIERS, {"x": X.cfloat()}, TypeError, r"x must be one of float64, .*, got complex64"),
    (CLASSIFIERS, {"w": W[0]}, ValueError, r"w must have shape \[C, D\] with at least one class, got \(12,\)"),
    (CLASSIFIERS, {"w": W[:0]}, ValueError, r"w must have shape \[C, D\] with at least one class, got \(0, 12\)"),
    (CLASSIFIERS, {"w": W.int()}, TypeError, r"w must be one of float64, .*, got int32"),
    (CLASSIFIERS, {"w": W.double()}, TypeError, r"w must have the dtype of x, float32, got float64"),
    (CLASSIFIERS, {"w": W.to("meta")}, ValueError, r"w must be on the device of x, cpu, got meta"),
    (CLASSIFIERS, {"num_heads": 5}, ValueError, r"num_heads must divide the last dimension of x, got 5 for 12"),
    (CLASSIFIERS, {"num_heads": 24}, ValueError, r"num_heads must divide the last dimension of x, got 24 for 12"),
    (CLASSIFIERS, {"num_heads": 0}, ValueError, r"num_heads must be at least 1, got 0"),
    (CLASSIFIERS, {"num_heads": -2}, ValueError, r"num_heads must be at least 1, got -2"),
    (CLASSIFIERS, {"num_heads": 2.0}, TypeError, r"num_heads must be an int, got float"),
    (CLASSIFIERS, {"tau": NAN}, ValueError, r"tau must be finite, got nan"),
    (CLASSIFIERS, {"tau": "16"}, TypeError, r"tau must be a number, got str"),
    (CLASSIFIERS, {"gamma": -1e-3}, ValueError, r"gamma must be finite and not negative, got -0\.001"),
    (CLASSIFIERS, {"gamma": NAN}, ValueError, r"gamma must be finite and not negative, got nan"),
    (CLASSIFIERS, {"gamma": None}, TypeError, r"gamma must be a number, got NoneType"),
    (CLASSIFIERS, {"exponent": INF}, ValueError, r"exponent must be finite and not negative, got inf"),
    (CLASSIFIERS, {"normalizer": "cosin"}, ValueError, r"normalizer must be one of .*'cosin'; did you mean 'cosine'\?"),
    (CLASSIFIERS, {"normalizer": "xyz"}, ValueError, r"normalizer must be one of linear, .*, got 'xyz'$"),
    (CLASSIFIERS, {"normalizer": "lws"}, ValueError, r"class_scale \[C\] is wanted by normalizer='lws', got None"),
    (CLASSIFIERS, {"class_scale": torch.ones(C)}, ValueError, r"class_scale is for normalizer='lws' alone"),
    (
        CLASSIFIERS,
        {"normalizer": "lws", "class_scale": torch.ones(C + 1)},
        ValueError,
        r"class_scale must have shape \(7,\), got \(8,\)",
    ),
    (
        CLASSIFIERS,
        {"normalizer": "lws", "class_scale": torch.ones(C, device="meta")},
        ValueError,
        r"class_scale must be on the device of x, cpu, got meta",
    ),
    (CLASSIFIERS, {"x": X.to_sparse()}, TypeError, r"x must be a dense tensor, got a sparse_coo one"),
    (CLASSIFIERS, {"w": W.to_sparse()}, TypeError, r"w must be a dense tensor, got a sparse_coo one"),
    (CLASSIFIERS, {"x": torch.nested.nested_tensor([X, X[:2]])}, TypeError, r"x must be a dense tensor, got a nested"),
    (CLASSIFIERS, {"tau": 10**400}, ValueError, r"tau must be finite, got 10"),
    (CLASSIFIERS, {"gamma": 10**400}, ValueError, r"gamma must be finite and not negative, got 10"),
    (CLASSIFIERS, {"normalizer": ["cosine"]}, TypeError, r"normalizer must be a string, got list"),
    (CLASSIFIERS, {"normalizer": None}, TypeError, r"normalizer must be a string, got NoneType"),
    (ALPHA, {"alpha": 1e39}, ValueError, r"alpha must be finite in float32, got 1e\+39"),
    (ALPHA, {"alpha": torch.tensor(1e39, dtype=torch.float64)}, ValueError, r"alpha must be finite in float32, got 1e"),
    (ALPHA, {"alpha": torch.tensor(1j)}, TypeError, r"alpha must be real, got complex64"),
    (ALPHA, {"alpha": torch.ones((), device="meta")}, ValueError, r"alpha must be on the device of x, cpu, got meta"),
    (COUNTERFACTUALS, {"direction": DIRECTION[:5]}, ValueError, r"direction must have shape \(12,\), got \(5,\)"),
    (COUNTERFACTUALS, {"direction": [0.0] * D}, TypeError, r"direction must be a tensor, got list"),
    (COUNTERFACTUALS, {"direction": DIRECTION.long()}, TypeError, r"direction must be one of float64.*got int64"),
    (COUNTERFACTUALS, {"direction": DIRECTION.to("meta")}, ValueError, r"direction must be on the device of x"),
    (ALPHA, {"alpha": NAN}, ValueError, r"alpha must be finite, got nan"),
    (ALPHA, {"alpha": -INF}, ValueError, r"alpha must be finite, got -inf"),
    (ALPHA, {"alpha": torch.tensor(NAN)}, ValueError, r"alpha must be finite"),
    (ALPHA, {"alpha": torch.ones(2)}, ValueError, r"alpha must be .* 0-d tensor"),
    (ALPHA, {"alpha": None}, TypeError, r"alpha must be a number, got NoneType"),
    (("alpha_sweep",), {"alphas": [1.0, NAN]}, ValueError, r"alphas must be finite, got \[1\.0, nan\]"),
    (("alpha_sweep",), {"alphas": torch.tensor([INF])}, ValueError, r"alphas must be finite"),
    (("alpha_sweep",), {"alphas": [[1.0]]}, ValueError, r"alphas must be a sequence of numbers, got shape \(1, 1\)"),
    (("alpha_sweep",), {"alphas": 1.0}, ValueError, r"alphas must be a sequence of numbers, got shape \(\)"),
    (("alpha_sweep",), {"alphas": ["a"]}, TypeError, r"alphas must be a sequence of numbers, got \['a'\]"),
    (("alpha_sweep",), {"alphas": torch.tensor([1j])}, TypeError, r"alphas must be real, got complex64"),
    (("alpha_sweep",), {"alphas": [10**400]}, ValueError, r"alphas must be finite, got \[10"),
    (("alpha_sweep",), {"alphas": torch.ones(2, device="meta")}, ValueError, r"alphas must be on the device of x, cpu"),
    (("head_direction",), {"ema": [1.0]}, TypeError, r"ema must be a tensor, got list"),
    (("head_direction",), {"ema": DIRECTION.long()}, TypeError, r"ema must be one of float64.*got int64"),
    (("head_direction",), {"ema": DIRECTION[0]}, ValueError, r"ema must have shape \[\.\.\., D\] .*, got \(\)"),
    (("head_direction",), {"num_heads": 5}, ValueError, r"num_heads must divide the last dimension of ema, got 5 for"),
    (("background_exempt",), {"background_index": C}, ValueError, r"background_index must be in \[-7, 7\), got 7"),
    (("background_exempt",), {"background_index": -8}, ValueError, r"background_index must be in \[-7, 7\), got -8"),
    (("background_exempt",), {"background_index": 0.0}, TypeError, r"background_index must be an int, got float"),
    (("background_exempt",), {"log": []}, TypeError, r"log must be a bool, got list"),
    (("topk",), {"k": C + 1}, ValueError, r"k must be at most the number of classes, 7, got 8"),
    (("topk",), {"k": 0}, ValueError, r"k must be at least 1, got 0"),
    (("topk",), {"k": 1.0}, TypeError, r"k must be an int, got float"),
    (EMA_, {"ema": EMA.double()}, TypeError, r"ema must be float32, got float64"),
    (EMA_, {"ema": torch.zeros(1, D)}, ValueError, r"ema must have shape \[D\], got \(1, 12\)"),
    (EMA_, {"ema": torch.zeros(2 * D)[::2]}, ValueError, r"ema must be contiguous, got strides \(2,\)"),
    (EMA_, {"ema": torch.zeros(5)}, ValueError, r"x must have shape \[\.\.\., 5\], got \(5, 12\)"),
    (EMA_, {"ema": EMA.to("meta")}, ValueError, r"ema must be on the device of x, cpu, got meta"),
    (EMA_, {"x": X.int()}, TypeError, r"x must be one of float64.*got int32"),
    (EMA_, {"momentum": 1.01}, ValueError, r"momentum must be in \[0, 1\], got 1\.01"),
    (EMA_, {"momentum": -0.1}, ValueError, r"momentum must be in \[0, 1\], got -0\.1"),
    (EMA_, {"momentum": NAN}, ValueError, r"momentum must be finite, got nan"),
    (EMA_, {"mask": torch.ones(5)}, TypeError, r"mask must be bool, got float32"),
    (EMA_, {"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask must have shape \(5,\), got \(4,\)"),
    (EMA_, {"mask": [True] * 5}, TypeError, r"mask must be a tensor, got list"),
    (EMA_, {"mask": torch.ones(5, dtype=torch.bool, device="meta")}, ValueError, r"mask must be on the device of x"),
    (LOSS, {"target": Y.int()}, TypeError, r"target must be int64, got int32"),
    (LOSS, {"target": Y[:3]}, ValueError, r"target must have shape \(5,\), got \(3,\)"),
    (LOSS, {"target": Y.tolist()}, TypeError, r"target must be a tensor, got list"),
    (LOSS, {"target": Y + 1}, ValueError, r"target must be in \[0, 7\) or ignore_index=-100, got 7"),
    (LOSS, {"target": Y - 1}, ValueError, r"target must be in \[0, 7\) or ignore_index=-100, got -1"),
    (LOSS, {"target_b": Y + 1}, ValueError, r"target_b must be in \[0, 7\)"),
    (LOSS, {"target": Y.to("meta")}, ValueError, r"target must be on the device of x"),
    (LOSS, {"class_weight": torch.ones(3)}, ValueError, r"class_weight must have shape \(7,\), got \(3,\)"),
    (LOSS, {"logit_bias": torch.ones(C).long()}, TypeError, r"logit_bias must be one of float64.*got int64"),
    (LOSS, {"margin": [0.5] * C}, TypeError, r"margin must be a tensor, got list"),
    (LOSS, {"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1\.5"),
    (LOSS, {"label_smoothing": NAN}, ValueError, r"label_smoothing must be finite, got nan"),
    (LOSS, {"lam": NAN, "target_b": Y}, ValueError, r"lam must be finite, got nan"),
    (LOSS, {"lam": 1.5, "target_b": Y}, ValueError, r"lam must be in \[0, 1\], got 1\.5"),
    (
        LOSS,
        {"lam": torch.ones(5), "target_b": Y},
        ValueError,
        r"lam must be a number or a 0-d tensor, got shape \(5,\)",
    ),
    (LOSS, {"lam": torch.tensor(2.0), "target_b": Y}, ValueError, r"lam must be in \[0, 1\], got 2\.0"),
    (LOSS, {"lam": torch.tensor(NAN), "target_b": Y}, ValueError, r"lam must be finite, got nan"),
    (LOSS, {"ignore_index": None}, TypeError, r"ignore_index must be an int, got NoneType"),
    (LOSS, {"ignore_index": True}, TypeError, r"ignore_index must be an int, got bool"),
    (LOSS, {"ignore_index": 2**63}, ValueError, r"ignore_index must fit into int64, got 9223372036854775808"),
    (LOSS, {"focal_exponent": -1.0}, ValueError, r"focal_exponent must not be negative, got -1\.0"),
    (LOSS, {"reduction": np.ones(3)}, ValueError, r"reduction must be one of 'none', 'mean', 'sum', got array"),
    (LOSS, {"reduction": "avg"}, ValueError, r"reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
]
CASES = [
    pytest.param(name, bad, error, message, id=f"{name}-{'-'.join(bad)}-{i}")
    for i, (names, bad, error, message) in enumerate(BAD)
    for name in names
]


@pytest.mark.parametrize("module", [F, reference], ids=["functional", "reference"])
@pytest.mark.parametrize(("name", "bad", "error", "message"), CASES)
def test_bad_argument(module: Any, name: str, bad: dict[str, Any], error: type[Exception], message: str) -> None:
    getattr(module, name)(**GOOD[name])
    before = EMA.clone()
    with pytest.raises(error, match=message):
        getattr(module, name)(**{**GOOD[name], **bad})
    assert torch.equal(EMA, before)


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (torch.zeros(()), TypeError, r"num_updates must be int64, got float32"),
        (torch.zeros(1, dtype=torch.int64), ValueError, r"num_updates must have shape \(\), got \(1,\)"),
        (3, TypeError, r"num_updates must be a tensor, got int"),
    ],
)
def test_bad_counter(count: Any, error: type[Exception], message: str) -> None:
    """An address of another size would be written over."""
    with pytest.raises(error, match=message):
        F.grouped_logits_with_ema_(X, W, EMA, count, momentum=0.9, **FAMILY)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"total": torch.zeros(D)}, ValueError, r"total must have shape \(13,\), got \(12,\)"),
        ({"total": torch.zeros(D + 1).double()}, TypeError, r"total must be float32, got float64"),
        ({"ema": EMA.double()}, TypeError, r"ema must be float32, got float64"),
        ({"ema": [0.0] * D}, TypeError, r"ema must be a tensor, got list"),
        ({"num_updates": torch.zeros(())}, TypeError, r"num_updates must be int64, got float32"),
        ({"momentum": 2.0}, ValueError, r"momentum must be in \[0, 1\], got 2\.0"),
    ],
)
def test_bad_fold(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    """Memory beyond a sum that is too short would be read, that of another dtype written."""
    good = {"ema": torch.zeros(D), "num_updates": None, "total": torch.zeros(D + 1), "momentum": 0.9}
    F.fold_ema_(**good)
    with pytest.raises(error, match=message):
        F.fold_ema_(**{**good, **bad})


def test_feature_sum_checks_too() -> None:
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        F.feature_sum([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mask must be bool"):
        F.feature_sum(X, torch.ones(5))
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., D\] with at least one channel, got \(2, 3, 0\)"):
        F.feature_sum(torch.zeros(2, 3, 0))


core = pytest.importorskip("tde_kernels._C", reason="no compiled core")
F32, BF16 = core.DType.f32, core.DType.bf16


def matrix(a: Tensor, *, rows: int | None = None, cols: int | None = None, stride: int | None = None) -> Any:
    return core.Matrix(
        a.data_ptr(),
        F32 if a.dtype == torch.float32 else BF16,
        a.shape[0] if rows is None else rows,
        a.shape[1] if cols is None else cols,
        a.stride(0) if stride is None else stride,
    )


NULL = core.Matrix(0, F32, 5, D, D)
PLAIN = core.RowTransform(2, 0.0, 1.0, 1.0)
SUMS = torch.zeros(C)
CORE_BAD = [
    (
        lambda: core.normalize_rows(NULL, PLAIN, matrix(X.clone()), threads=1),
        "a [5, 12], rows 12 elements apart, has no memory",
    ),
    (
        lambda: core.normalize_rows(matrix(X), PLAIN, NULL, threads=1),
        "out [5, 12], rows 12 elements apart, has no memory",
    ),
    (lambda: core.normalize_rows(matrix(X), PLAIN, matrix(W), threads=1), "a and out differ in shape: [5, 12] and"),
    (
        lambda: core.normalize_rows(matrix(X, rows=-1), PLAIN, matrix(X), threads=1),
        "a [-1, 12], rows 12 elements apart, has a negative size",
    ),
    (
        lambda: core.normalize_rows(matrix(X, stride=-12), PLAIN, matrix(X), threads=1),
        "a [5, 12], rows -12 elements apart, has a negative row stride",
    ),
    (
        lambda: core.normalize_rows(matrix(X), core.RowTransform(5, 0.0, 1.0, 1.0), matrix(X), threads=1),
        "5 heads do not divide 12 columns",
    ),
    (
        lambda: core.normalize_rows(matrix(X), core.RowTransform(0, 0.0, 1.0, 1.0), matrix(X), threads=1),
        "0 heads do not divide 12 columns",
    ),
    (
        lambda: core.normalize_rows(
            matrix(X), core.RowTransform(2, 0.0, 1.0, 1.0, alpha=SUMS.data_ptr()), matrix(X), threads=1
        ),
        "alpha and projections need a direction",
    ),
    (
        lambda: core.normalize_rows_backward(matrix(X), matrix(X), 0, PLAIN, matrix(X), threads=1),
        "norms are missing",
    ),
    (
        lambda: core.normalize_rows_backward(
            matrix(X), matrix(X), SUMS.data_ptr(), PLAIN, matrix(X), grad_divisor=SUMS.data_ptr(), threads=1
        ),
        "no divisor",
    ),
    (
        lambda: core.normalize_rows_backward(
            matrix(X), matrix(X), SUMS.data_ptr(), PLAIN, matrix(X.bfloat16()), threads=1
        ),
        "grad_a must have the dtype of a",
    ),
    (lambda: core.feature_sum(NULL, 0, SUMS.data_ptr(), 1), "x [5, 12], rows 12 elements apart, has no memory"),
    (lambda: core.feature_sum(matrix(X), 0, 0, 1), "nowhere to write"),
    (lambda: core.fold_ema(0, 0, SUMS.data_ptr(), 6, 0.9), "fold_ema"),
    (lambda: core.fold_ema(SUMS.data_ptr(), 0, 0, 6, 0.9), "fold_ema"),
    (
        lambda: core.background_exempt(matrix(X.bfloat16()), 0, 0, 1, 0, 0, True, matrix(X), 1),
        "logits must be float32",
    ),
    (
        lambda: core.background_exempt(matrix(X), 0, 0, 1, 0, 0, True, matrix(X), 1),
        "alpha and at least one head are needed",
    ),
    (
        lambda: core.background_exempt(
            matrix(X), SUMS.data_ptr(), SUMS.data_ptr(), 1, SUMS.data_ptr(), 12, True, matrix(X), 1
        ),
        "background 12 is not one of 12 classes",
    ),
    (
        lambda: core.background_exempt(matrix(X), 0, 0, 1, SUMS.data_ptr(), 0, True, matrix(X.clone()), 1),
        "projections are missing",
    ),
]


@pytest.mark.parametrize(("call", "message"), CORE_BAD, ids=range(len(CORE_BAD)))
def test_the_core_answers_bad_arguments_with_an_error(call: Any, message: str) -> None:
    kept = X.clone()
    with pytest.raises(RuntimeError) as caught:
        call()
    assert message in str(caught.value)
    assert torch.equal(X, kept)


def test_the_core_wants_numbers() -> None:
    with pytest.raises(TypeError):
        core.Matrix("x", F32, 1, 1, 1)
    with pytest.raises(TypeError):
        core.Matrix(0, "float32", 1, 1, 1)
