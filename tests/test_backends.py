"""Which implementation serves, how one asks for another, and what is said where it cannot be had."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import FUSED

import tde_kernels
from tde_kernels import backends, use_backend
from tde_kernels import functional as F
from tde_kernels.backends import cuda, triton
from tde_kernels.backends.traced import cuda_device_refusal

HERE = Path(__file__).parent
X, W = torch.randn(5, 12), torch.randn(7, 12)
FAMILY = {"num_heads": 2, "tau": 16.0}


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that finds these tests' oracle."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def choice(**environment: str) -> str:
    code = (
        "import torch\nfrom tde_kernels import backends\n"
        "print(backends.select('logits', torch.device('cpu'), torch.float32, None))"
    )
    return python(code, **environment).stdout.strip()


def chosen(asked: str | None = None, dtype: torch.dtype = torch.float32) -> str:
    return backends.select("logits", torch.device("cpu"), dtype, asked)


needs_core = pytest.mark.skipif(backends.core.missing is not None, reason="no compiled core")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
needs_interpreter = pytest.mark.skipif(
    backends.refusal("triton", "logits", "cpu", torch.float32) is not None, reason="Triton's kernels are compiled here"
)
GPUS_ALONE = "it serves GPUs (TRITON_INTERPRET=1 runs its kernels on the CPU, slowly)"


@needs_core
def test_the_device_decides() -> None:
    assert (
        chosen() == "cpu" and chosen(dtype=torch.float64) == "reference" and chosen(dtype=torch.float16) == "reference"
    )


@needs_core
def test_argument_beats_context_beats_environment() -> None:
    assert choice(TDE_BACKEND="reference") == "reference"
    assert choice(TDE_BACKEND="") == "cpu"
    assert choice(TDE_BACKEND="triton", TRITON_INTERPRET="1") == "triton"
    assert choice(TDE_BACKEND="triton", TRITON_INTERPRET="0") == "cpu"  # a preference, where it cannot serve, gives way
    with use_backend("reference"):
        assert chosen() == "reference" and chosen("cpu") == "cpu"
        with use_backend("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
    assert chosen() == "cpu"


def test_the_context_ends_with_an_exception_too() -> None:
    before = chosen()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert chosen() == before


@needs_core
def test_it_is_the_one_asked_for_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = backends.cpu.logits
    monkeypatch.setattr(backends.cpu, "logits", lambda *a, **k: calls.append(1) or real(*a, **k))
    F.grouped_logits(X, W, **FAMILY, backend="reference")
    assert not calls
    F.grouped_logits(X, W, **FAMILY)
    F.grouped_logits(X, W, **FAMILY, backend="cpu")
    with use_backend("reference"):
        F.grouped_logits(X, W, **FAMILY)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("name", "hint"), [("tritn", "; did you mean 'triton'?"), ("Cuda", "; did you mean 'cuda'?"), ("xyz", "got 'xyz'")]
)
def test_unknown_names(name: str, hint: str) -> None:
    for ask in (
        lambda: F.grouped_logits(X, W, **FAMILY, backend=name),
        lambda: use_backend(name).__enter__(),
        lambda: F.update_head_ema_(torch.zeros(12), X, momentum=0.9, backend=name),
    ):
        with pytest.raises(ValueError, match="backend must be one of reference, cpu, cuda, triton, got") as caught:
            ask()
        assert hint in str(caught.value)
    failed = python("import tde_kernels", TDE_BACKEND=name)
    assert failed.returncode != 0 and "TDE_BACKEND must be one of" in failed.stderr and hint in failed.stderr


@needs_core
def test_one_asked_for_by_name_serves_or_raises() -> None:
    for ask in (
        lambda: F.grouped_logits(X.double(), W.double(), **FAMILY, backend="cpu"),
        lambda: F.feature_sum(X.double(), backend="cpu"),
        lambda: F.topk(X.double(), W.double(), 2, **FAMILY, backend="cpu"),
    ):
        with pytest.raises(ValueError, match=r"backend='cpu' cannot serve \w+: .* not float64"):
            ask()
    with pytest.raises(ValueError, match=r"cannot serve logits: .* not float64"), use_backend("triton"):
        F.grouped_logits(X.double(), W.double(), **FAMILY)
    with pytest.raises(ValueError, match="backend='cuda' cannot serve logits"):
        F.grouped_logits(X, W, **FAMILY, backend="cuda")
    direction = torch.randn(12, requires_grad=True)
    with pytest.raises(
        ValueError, match="backend='cpu' cannot serve logits: it has no gradient for direction and alpha"
    ):
        F.tde_logits(X, W, direction, alpha=1.0, **FAMILY, backend="cpu")


def test_a_gradient_of_direction_and_alpha_comes_from_the_reference() -> None:
    direction, alpha = torch.randn(12, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    F.tde_logits(X, W, direction, alpha=alpha, **FAMILY).sum().backward()
    assert direction.grad is not None and direction.grad.any() and alpha.grad is not None and alpha.grad.item()


@needs_triton
def test_triton_refuses_float64_by_name() -> None:
    for ask in (
        lambda: F.grouped_logits(X.double(), W.double(), **FAMILY, backend="triton"),
        lambda: F.feature_sum(X.double(), backend="triton"),
        lambda: F.topk(X.double(), W.double(), 2, **FAMILY, backend="triton"),
    ):
        with pytest.raises(ValueError, match=r"\w+: it serves float32, bfloat16 and float16, not float64"):
            ask()


@pytest.mark.parametrize("problem", ["", "no kernel image"])
def test_the_compiler_takes_the_probe_of_a_device_as_it_is(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not look into the compiled core: without a constant, fullgraph would fail on every GPU."""
    probe = Mock(return_value=problem)
    monkeypatch.setattr(backends.core, "compiled", lambda: SimpleNamespace(cuda_probe=probe))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    cuda.device_refusal.cache_clear()
    torch.compiler.reset()
    try:
        refuses = torch.compile(lambda x: x + (cuda_device_refusal(7) is not None), fullgraph=True, backend="eager")
        assert refuses(torch.zeros(())).item() == bool(problem)
        probe.assert_called_once_with()
    finally:
        cuda.device_refusal.cache_clear()
        torch.compiler.reset()


@needs_triton
@needs_interpreter
def test_interpreted_triton_serves_the_cpu_when_asked() -> None:
    """By name alone: it is no device's preference there."""
    assert chosen() != "triton" and chosen("triton") == "triton"
    assert choice(TDE_BACKEND="triton", TRITON_INTERPRET="1") == "triton"
    with use_backend("triton"):
        got = F.grouped_logits(X, W, **FAMILY)
    torch.testing.assert_close(got, F.grouped_logits(X, W, **FAMILY, backend="reference"))


COMPILED_TRITON = """
import torch
from tde_kernels import functional as F
try:
    F.grouped_logits(torch.ones(2, 4), torch.ones(3, 4), num_heads=1, tau=1.0, backend="triton")
except ValueError as error:
    print(error)
"""


@needs_triton
@pytest.mark.parametrize("switch", ["", "0"])
def test_compiled_triton_refuses_cpu_tensors(switch: str) -> None:
    done = python(COMPILED_TRITON, TRITON_INTERPRET=switch)
    assert done.stdout.strip() == f"backend='triton' cannot serve logits: {GPUS_ALONE}", done.stderr[-3000:]


@pytest.fixture(params=[None, "3.5.1", "2.0"], ids=lambda version: version or "missing")
def without_triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An installation whose Triton is missing or too old, with TDE_BACKEND=triton; why that cannot serve."""
    installed, real = request.param, importlib.metadata.version

    def version(name: str) -> str:
        if name != "triton":
            return real(name)
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(backends, "_environment", "triton")
    triton._installation_refusal.cache_clear()
    yield "Triton is not installed" if installed is None else f"it needs Triton 3.6 or newer, found {installed}"
    triton._installation_refusal.cache_clear()


def test_a_triton_that_cannot_be_used_is_passed_over(without_triton: str) -> None:
    """A preference gives way, and info() says why; whoever names it in code is told."""
    info = tde_kernels.info()
    for c in info.choices:
        assert c.backend != "triton"
        if c.dtype != "float64":
            assert c.passed_over["triton"] == without_triton
    assert without_triton in str(info)
    want = F.grouped_logits(X, W, **FAMILY, backend="reference")
    torch.testing.assert_close(F.grouped_logits(X, W, **FAMILY), want)
    with pytest.raises(ValueError) as caught:
        F.grouped_logits(X, W, **FAMILY, backend="triton")
    assert str(caught.value) == f"backend='triton' cannot serve logits: {without_triton}"
    with pytest.raises(ValueError, match="backend='triton' cannot serve feature_sum"), use_backend("triton"):
        F.feature_sum(X)


def test_the_next_triton_is_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are compared as numbers: 3.10 is after 3.6."""
    for version in ("3.6.0", "3.10.0", "4.0.0+git1234"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, found=version: found)
        assert triton._installation_refusal.__wrapped__() is None


def test_every_backend_answers_for_every_op() -> None:
    for name in backends.NAMES:
        for op in backends.OPS:
            for device in ("cpu", "cuda", "mps"):
                for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                    reason = backends.refusal(name, op, device, dtype)
                    assert reason is None or len(reason) > 10
    assert backends.select("logits", torch.device("mps"), torch.float32, None) == "reference"


def test_info() -> None:
    info = tde_kernels.info()
    assert {"tde_kernels", "python", "torch", "triton"} <= set(info.versions)
    cpu = [c for c in info.choices if c.device == "cpu"]
    assert {(c.op, c.dtype) for c in cpu} == {
        (op, dtype) for op in backends.OPS for dtype in ("float32", "bfloat16", "float16", "float64")
    }
    for c in info.choices:
        assert c.backend == backends.select(c.op, torch.device(c.device), getattr(torch, c.dtype), None)
        assert all(reason for reason in c.passed_over.values())
    text = str(info)
    assert tde_kernels.__version__ in text and torch.__version__ in text and "float64" in text
    assert python("import runpy; runpy.run_module('tde_kernels', run_name='__main__')").stdout.strip()


CHECK = """
import torch
from oracle import NORMALIZERS, assert_close, gradients, naive_logits, naive_exempt, problem, reference_logits
from tde_kernels import functional as F, info
print(info().build["cpu"].split()[0])
torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True, warn_only=True)
def ours(p):
    return F.tde_logits(p.x, p.w, p.direction, alpha=p.alpha, **p.family, backend="cpu")
for dtype in (torch.float32, torch.bfloat16):
    for normalizer in NORMALIZERS:
        for shape in ((33, 39, 17), (70, 127 * 3, 9)):
            p = problem(shape[0], shape[1], shape[2], 3, normalizer, tde=True, dtype=dtype)
            up = torch.randn(shape[0], shape[2]).to(dtype)
            want, wants = gradients(p.cast(torch.float64, grad=True), reference_logits, up)
            naive, naives = gradients(p.cast(dtype, grad=True), naive_logits, up)
            got, gots = gradients(p.cast(dtype, grad=True), ours, up)
            for a, b, c in zip((got, *gots), (naive, *naives), (want, *wants)):
                assert_close(a, b, c, normalizer)
            mask = torch.rand(shape[0]) > 0.4
            total = F.feature_sum(p.x, mask, backend="cpu")
            torch.testing.assert_close(total[:-1], p.x[mask].double().sum(0).float(), rtol=1e-5, atol=1e-5)
            for log in (False, True):
                options = dict(alpha=1.0, background_index=1, log=log, **p.family)
                e = F.background_exempt(p.x, p.w, p.direction, **options, backend="cpu")
                q = p.cast(torch.float64)
                options["class_scale"] = q.class_scale
                r = F.background_exempt(q.x, q.w, q.direction, **options)
                torch.testing.assert_close(e.double(), r, rtol=2 * torch.finfo(dtype).eps + 2e-5, atol=2e-5 * 256)
"""


@needs_core
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    """What runs on another machine, as far as this one can: values, gradients, sums and Eq. 9 under poisoned memory."""
    done = python(CHECK, TDE_CPU_ISA=isa, MALLOC_PERTURB_="1")
    assert done.returncode == 0, done.stderr[-3000:]
    if done.stdout.split()[0] != isa:
        pytest.skip(f"this machine or build has no {isa}")


WITHOUT_CORE = """
import sys
sys.modules["tde_kernels._C"] = None
import torch, tde_kernels
from tde_kernels import functional as F
head = tde_kernels.FusedTDEHead(12, 7)
head(torch.randn(5, 12)).sum().backward()
assert head.num_updates == 1 and head.weight.grad is not None
head.eval().predict(torch.randn(5, 12), topk=2)
info = tde_kernels.info()
assert "compiled core is missing" in str(info)
assert {c.backend for c in info.choices if c.device == "cpu"} == {"reference"}
try:
    F.grouped_logits(torch.ones(2, 4), torch.ones(3, 4), num_heads=1, tau=1.0, backend="cpu")
except ValueError as error:
    assert "cannot serve logits: the compiled core is missing" in str(error), error
else:
    raise AssertionError
print("served")
"""


def test_a_missing_core_leaves_the_reference() -> None:
    done = python(WITHOUT_CORE)
    assert done.returncode == 0 and done.stdout.strip() == "served", done.stderr[-3000:]


ONE_POOL = """
import os, torch
from tde_kernels import functional as F
threads = lambda: len(os.listdir("/proc/self/task"))
x, w = torch.randn(4096, 64, requires_grad=True), torch.randn(1000, 64, requires_grad=True)
(x @ w.t()).relu().sum().backward()
before = threads()
for classes in (10, 1000):  # in one call of the core, and in passes around products
    F.grouped_logits(x, w[:classes], num_heads=2, tau=16.0, backend="cpu").sum().backward()
mapped = {line.split()[-1] for line in open("/proc/self/maps")}
runtimes = [path for path in mapped if os.path.basename(path).startswith(("libgomp", "libiomp", "libomp"))]
print(threads() - before, len(runtimes))
"""


@pytest.mark.skipif(("cpu", "cpu") not in FUSED or not sys.platform.startswith("linux"), reason="no compiled core")
def test_threads_are_torchs() -> None:
    """One OpenMP runtime, and no thread beside its: two pools would spin against each other."""
    done = python(ONE_POOL)
    assert done.stdout.split() == ["0", "1"], done.stdout + done.stderr[-3000:]


def test_the_context_raises_where_a_gradient_is_beyond_the_kernels() -> None:
    """As the argument does: asked for by name, a backend serves or says why not."""
    x, w, direction = torch.randn(3, 8), torch.randn(4, 8), torch.randn(8, requires_grad=True)
    with tde_kernels.use_backend("cpu"), pytest.raises(ValueError, match="no gradient for direction and alpha"):
        F.tde_logits(x, w, direction, alpha=1.0, num_heads=2, tau=16.0)


def test_meta_tensors_give_shapes() -> None:
    head = tde_kernels.FusedTDEHead(8, 4, device="meta").eval()
    assert head(torch.empty(5, 8, device="meta")).shape == (5, 4)


@pytest.mark.parametrize(
    ("version", "reason"), [(None, "Triton is not installed"), ("3.1.0", "it needs Triton 3.6 or newer, found 3.1.0")]
)
def test_a_missing_or_old_triton_is_passed_over(
    version: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(_: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    backends.triton._installation_refusal.cache_clear()
    try:
        assert backends.refusal("triton", "logits", "cuda", torch.float32) == reason
        with pytest.raises(ValueError, match=f"backend='triton' cannot serve logits: {reason}"):
            F.grouped_logits(X, W, **FAMILY, backend="triton")
        assert F.grouped_logits(X, W, **FAMILY).isfinite().all()
    finally:
        backends.triton._installation_refusal.cache_clear()


def test_an_unknown_instruction_set_is_an_error() -> None:
    done = python("import tde_kernels", TDE_CPU_ISA="avx3")
    assert done.returncode != 0 and "TDE_CPU_ISA must be one of" in done.stderr and "avx3" in done.stderr
