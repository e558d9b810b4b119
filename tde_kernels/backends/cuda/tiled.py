"""Problems of middling size: logits in one pass on tensor cores, norms and EMA included."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from tde_kernels.backends import core, crossovers
from tde_kernels.backends.core import Kept, Saved
from tde_kernels.backends.cuda.device import scratch, stream_of
from tde_kernels.backends.cuda.ema import ema_update
from tde_kernels.backends.grouped import Grouped, Intake, Rows

_ACCESS = 16  # bytes: every head of a row starts on as many
_MOST_CLASSES = 64 * 65535


def can_serve(p: Grouped, dtype: torch.dtype) -> bool:
    """Whether this kernel can serve the problem, from shapes, dtypes and torch's flags; ``dtype`` is the result's."""
    (batch, dim), classes = p.x.shape, p.w.shape[0]
    whole = dim // p.heads * p.x.element_size() % _ACCESS == 0
    sized = batch > 0 and dim > 0 and 0 < classes <= _MOST_CLASSES
    alike = p.x.dtype == p.w.dtype and dtype in (p.x.dtype, torch.float32)
    return whole and sized and alike and crossovers.arithmetic(p.x.dtype) == "tensor cores"


@cache
def hopper_refusal(device: torch.device) -> str | None:
    """Why the device cannot run the kernels that use Hopper's own instructions, or None."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return core.compiled().cuda_probe_hopper() or None


def _on_hopper(p: Grouped) -> bool:
    """Whether Hopper's own instructions serve the problem: they would cut float32 off to tf32, not round it."""
    wanted = crossovers.plan
    if wanted not in ("tiled", "hopper"):
        wanted = crossovers.choose(crossovers.TILED, p.x.shape[0] * p.x.shape[1] * p.w.shape[0])
    return wanted == "hopper" and p.x.dtype != torch.float32 and hopper_refusal(p.x.device) is None


def saves(p: Grouped) -> list[Saved]:
    """See :class:`~tde_kernels.backends.core.Saved`: norms, where there are factors."""

    def norms(rows: Rows) -> Saved:
        return Saved((rows.a.shape[0], p.heads) if rows.factor.power else (0,))

    return [Saved((0,)), Saved((0,)), norms(p.features), norms(p.weights), Saved((0,))]


def _aligned(a: Tensor) -> Tensor:
    """``a`` where each of its rows starts on 16 bytes, and past the one before, else a copy in which they do."""
    a = core.dense_rows(a)
    # The copy engine's descriptors know no rows that overlap, as those of an expanded tensor do
    rows = a.stride(0) * a.element_size() % _ACCESS == 0 and (a.shape[0] < 2 or a.stride(0) >= a.shape[1])
    return a if rows and a.data_ptr() % _ACCESS == 0 else a.clone(memory_format=torch.contiguous_format)


def _run(
    p: Grouped,
    features: Rows,
    out_dtype: torch.dtype,
    *,
    norms: tuple[Tensor | None, Tensor | None] = (None, None),
    along: tuple[Tensor | None, Tensor | None] = (None, None),
    update: object = None,
) -> Tensor:
    compiled, hopper = core.compiled(), _on_hopper(p)
    x, w = _aligned(p.x), _aligned(p.w)
    direction = None if features.direction is None else _aligned(features.direction[None])[0]
    z = x.new_empty((x.shape[0], w.shape[0]), dtype=out_dtype)
    floats, counters = scratch(x, compiled.cuda_tiled_logits_scratch(x.shape[0], w.shape[0], x.shape[1], hopper))
    with stream_of(x) as stream:
        compiled.cuda_tiled_logits(
            compiled.Operand(core.matrix(x), core.row_transform(replace(features, direction=direction))),
            compiled.Operand(core.matrix(w), core.row_transform(p.weights)),
            compiled.LogitsByproducts(*map(core.address, (*norms, *along))),
            compiled.EmaUpdate() if update is None else update,
            core.matrix(z),
            hopper,
            floats.data_ptr(),
            counters.data_ptr(),
            stream,
        )
    return z


def logits(p: Grouped, intake: Intake, sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Kept]:
    """The logits and what :func:`saves` lists; ``sums [D + 1]`` is filled if it is asked for."""
    saved = core.allocated(p.x, saves(p))
    update = ema_update(intake, sums)
    core.mark_written(intake.ema, intake.num_updates)
    z = _run(p, p.features, dtype, norms=(saved.x_norms, saved.w_norms), update=update)
    return z, saved


def effects(p: Grouped) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`tde_kernels.reference.effects`: Eq. 7 ``[B, C]``, projections ``[B, K]`` and ``[C, K]``, in float32."""
    along_x, along_w = (a.new_empty((a.shape[0], p.heads), dtype=torch.float32) for a in (p.x, p.w))
    z = _run(p, p.features.towards(p.direction), torch.float32, along=(along_x, along_w))
    return z, along_x, along_w
