"""A head in a file of its own: its tensors, and what it was built with as metadata."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized

from tde_kernels import FusedTDEHead
from tde_trainer.errors import UserError
from tde_trainer.files import write_atomic

FILE = "tde_head.safetensors"
ARGUMENTS = (
    "in_features",
    "num_classes",
    "num_heads",
    "tau",
    "gamma",
    "momentum",
    "normalizer",
    "background_index",
    "exponent",
)


def save_head(path: Path, head: FusedTDEHead) -> None:
    """Write weight, moving average, alpha and the constructor's arguments, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    arguments = {name: getattr(head, name) for name in ARGUMENTS}
    write_atomic(path, serialized(tensors, {"head": json.dumps(arguments)}))


def load_head(path: Path) -> FusedTDEHead:
    """The head in evaluation mode, on the CPU.

    Raises:
        UserError: the file is missing, corrupt, or holds no head.
    """
    if not path.is_file():
        raise UserError(f"no head at {path}; `tde fit-direction` writes one")
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()  # the handle itself can't be iterated
            tensors = {name: file.get_tensor(name) for name in names}
            arguments = json.loads((file.metadata() or {})["head"])
        head = FusedTDEHead(**arguments, dtype=tensors["weight"].dtype)
        head.load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path} holds no head that `tde fit-direction` wrote: {error}") from error
    return head.eval()
