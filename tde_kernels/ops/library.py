"""The ``tde`` namespace of ``torch.library``: ops are defined by schema, implemented by the backends.

``define`` + ``impl`` + ``register_fake`` cost a call far less than ``torch.library.custom_op``. No op knows autograd:
gradients are autograd Functions around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tde_kernels.backends import implementation

_LIBRARY = torch.library.Library("tde", "DEF")


def define(schema: str, *, fake: Callable[..., Any]) -> None:
    """Defines ``tde::<schema>``, run by the function of that name in the module that its ``backend`` argument names.

    Args:
        schema: with a last argument ``str backend``, which the implementations do not take.
        fake: the op on shapes alone.
    """
    name = schema[: schema.index("(")]

    def run(*args: Any, backend: str, **kwargs: Any) -> Any:
        op, device = getattr(implementation(backend), name), args[0].device.type
        if not torch.is_autocast_enabled(device):
            return op(*args, **kwargs)
        with torch.autocast(device, enabled=False):  # dtypes were settled above; products inside keep theirs
            return op(*args, **kwargs)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tde::{name}", fake, lib=_LIBRARY)
