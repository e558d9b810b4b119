"""A head in a file of its own: its tensors, and what it was built with as metadata."""

from __future__ import annotations

import json
from pathlib import Path

from tde_kernels import FusedTDEHead
from tde_trainer.errors import UserError
from tde_trainer.tensor_file import one_line, read_safetensors, write_safetensors

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
    arguments = {name: getattr(head, name) for name in ARGUMENTS}
    write_safetensors(path, head.state_dict(), {"head": json.dumps(arguments)})


def load_head(path: Path) -> FusedTDEHead:
    """The head in evaluation mode, on the CPU.

    Raises:
        UserError: the file is missing, corrupt, or holds no head.
    """
    if not path.is_file():
        raise UserError(f"no head at {path}; `tde fit-direction` writes one")
    try:
        tensors, metadata = read_safetensors(path)
        arguments = json.loads(metadata["head"])
        head = FusedTDEHead(**arguments, dtype=tensors["weight"].dtype)
        head.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} holds no head that `tde fit-direction` wrote: {one_line(error)}") from error
    return head.eval()
