"""Numbers of record: every backend against those of each release, and every checkpoint that one has written.

A red test here means that this version computes something else, or reads something else, than a released one did.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from checkpoints import Small, heads, optimizer_of, predictions
from conftest import FUSED
from oracle import Problem, assert_within, error, tiny
from safetensors.torch import load_file
from tde_trainer import checkpoint, results
from tde_trainer.checkpoint import Progress
from tde_trainer.errors import UserError
from tde_trainer.restore import evaluate_cell
from torch import Tensor, nn

import tde_kernels
from tde_kernels import FusedTDEHead, backends

HERE = Path(__file__).resolve().parent
SUMS = HERE / "SHA256SUMS"
RELEASES = sorted(path.parent.name for path in HERE.glob("*/ops.safetensors"))
WRITERS = sorted(str(path.parent.relative_to(HERE)) for path in HERE.glob("**/predictions.safetensors"))
HEADS = [(writer, path.stem) for writer in WRITERS for path in sorted((HERE / writer).glob("head*.pt"))]
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SERVED = [("reference", "cpu"), *FUSED]

of_release = pytest.mark.parametrize("release", RELEASES)
of_normalizer = pytest.mark.parametrize("normalizer", cases.NORMALIZERS)
by_writer = pytest.mark.parametrize("writer", WRITERS)


@cache
def recorded(file: str) -> dict[str, Tensor]:
    return load_file(HERE / file)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def test_what_is_recorded_never_changes() -> None:
    listed = dict(reversed(line.split("  ")) for line in SUMS.read_text().splitlines())
    files = {str(path.relative_to(HERE)) for path in HERE.glob("*/**/*") if path.is_file() and path.suffix != ".pyc"}
    assert files == set(listed)
    for file, digest in listed.items():
        assert hashlib.sha256((HERE / file).read_bytes()).hexdigest() == digest, f"{file} has changed"


def test_this_version_is_on_record() -> None:
    """``python tests/golden/record.py`` does it; CONTRIBUTING.md says when."""
    assert tde_kernels.__version__ in RELEASES


def problem_of(release: str, normalizer: str) -> tuple[Problem, dict[str, Tensor]]:
    """The operands that were recorded, in float64, and the results."""
    record = under(f"{normalizer}/", recorded(f"{release}/ops.safetensors"))
    operands = {name: record.pop(name, None) for name in ("x", "w", "direction", "class_scale")}
    return replace(cases.problem(normalizer), **operands), record


@of_release
@of_normalizer
def test_the_reference_in_float64(release: str, normalizer: str) -> None:
    p, record = problem_of(release, normalizer)
    made = cases.problem(normalizer)
    assert torch.equal(made.x, p.x) and torch.equal(made.w, p.w), "integer arithmetic gives other operands"
    now = cases.exact(p)
    for name, want in record.items():
        if name.endswith(".classes"):
            assert torch.equal(now[name], want), name
        else:
            assert error(now[name], want) < 1e-13 if want.dtype == torch.float64 else 1e-6, name


@of_release
@of_normalizer
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize("served", SERVED, ids="-".join)
def test_every_backend(served: tuple[str, str], dtype: torch.dtype, normalizer: str, release: str) -> None:
    """Within twice naive torch's error of the record in float64, and of what the release itself has computed."""
    backend, device = served
    if backends.refusal(backend, "logits", device, dtype) is not None:
        pytest.skip(f"{backend} does not serve {dtype}")
    p, record = problem_of(release, normalizer)
    now, naive = cases.results(p.cast(dtype, device), backend), cases.naive(p.cast(dtype))
    file = f"{release}/{backend}.safetensors"
    own = under(f"{DTYPES[dtype]}/{normalizer}/", recorded(file) if (HERE / file).exists() else {})
    for name, want in record.items():
        got = now[name].cpu()
        if name == "alpha_sweep.classes":  # of a product in float32
            assert torch.equal(got, want), name
        elif name == "topk.classes":
            of_chosen = record["tde_logits"].gather(-1, got)
            assert error(of_chosen, record["topk"]) <= 2 * error(naive["topk"], record["topk"]) + tiny(dtype), name
        else:
            theirs = error(naive[name], want)
            assert_within(got, theirs, want.double(), name)
            if own:
                assert got.dtype == own[name].dtype, name
                assert_within(got, theirs, own[name].double(), f"{name}, as {release} had it")


def assert_predicts(network: nn.Module, writer: str, name: str) -> None:
    """The logits, and so the classes, that were recorded with the checkpoint."""
    want = under(f"{name}/", recorded(f"{writer}/predictions.safetensors"))
    for mode, got in predictions(network).items():
        torch.testing.assert_close(got, want[mode], rtol=1e-5, atol=1e-5)
        assert torch.equal(got.argmax(-1), want[mode].argmax(-1))


@pytest.mark.parametrize(("writer", "name"), HEADS)
def test_a_heads_checkpoint(writer: str, name: str) -> None:
    head = heads()[name]
    head.load_state_dict(torch.load(HERE / writer / f"{name}.pt", weights_only=True))
    assert head.num_updates == 3
    assert_predicts(head, writer, name)


@by_writer
def test_a_class_parallel_head_and_one_process_read_each_other(writer: str) -> None:
    made = heads()
    for file, into in (("head", "head_class_parallel"), ("head_class_parallel", "head")):
        if (HERE / writer / f"{file}.pt").exists():
            made[into].load_state_dict(torch.load(HERE / writer / f"{file}.pt", weights_only=True))
            assert_predicts(made[into], writer, file)


@by_writer
def test_a_published_checkpoint(writer: str) -> None:
    state = torch.load(HERE / writer / "published.pt", weights_only=True)
    assert_predicts(FusedTDEHead.load_published(state, alpha=1.5), writer, "published")


@by_writer
def test_a_trainers_checkpoint(writer: str) -> None:
    network = Small()
    optimizer = optimizer_of(network)
    assert checkpoint.load(HERE / writer, network, optimizer) == Progress(seed=3, epochs_done=2, seconds=1.5)
    assert len(optimizer.state_dict()["state"]) == len(list(network.parameters()))
    assert_predicts(network, writer, "trainer")
    alone = heads()["head"]
    checkpoint.load_part(HERE / writer, "head", alone)
    assert all(map(torch.equal, alone.state_dict().values(), network.head.state_dict().values()))


@of_release
def test_a_trainers_run(release: str) -> None:
    """Its accuracy is what it was, with TDE and without, from the checkpoint and the run's own settings."""
    (cell,) = results.finished_cells(HERE / release / "run")
    for mode, groups in evaluate_cell(cell, cell.values["alpha"]["value"]).items():
        for group, then in cell.values["accuracy"][mode].items():
            assert groups[group] == pytest.approx(then, abs=1e-4), (mode, group)


def newer(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The state of a head, changed as a later version might write it."""
    state: dict[str, Any] = heads()["head"].state_dict()
    change(state)
    return state


def raise_version(state: Any) -> None:
    state._metadata[""]["version"] = 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (raise_version, r"newer version of the head: its format is 2, known is 1"),
        (lambda state: state.update(ema_of_squares=torch.ones(3)), r"Unexpected key\(s\).*ema_of_squares"),
        (lambda state: state.pop("ema"), r"Missing key\(s\).*ema"),
    ],
    ids=["version", "unknown key", "missing key"],
)
@pytest.mark.parametrize("name", ["head", "head_class_parallel"])
def test_a_newer_versions_checkpoint(name: str, change: Any, message: str, tmp_path: Path) -> None:
    """It is an error that says so, also through a file, and of the trainer's checkpoints too."""
    torch.save(newer(change), tmp_path / "head.pt")
    head = heads()[name]
    before = {key: value.clone() for key, value in head.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        head.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    if change is raise_version:
        assert all(map(torch.equal, head.state_dict().values(), before.values()))


def test_a_newer_trainers_checkpoint(tmp_path: Path) -> None:
    network = Small()
    checkpoint.save(tmp_path, network, optimizer_of(network), Progress(0))
    content = torch.load(tmp_path / checkpoint.FILE, weights_only=True)
    torch.save({**content, "format": torch.tensor(checkpoint.FORMAT + 1)}, tmp_path / checkpoint.FILE)
    with pytest.raises(UserError, match="is of a newer version"):
        checkpoint.load(tmp_path, network)
