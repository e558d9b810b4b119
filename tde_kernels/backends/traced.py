"""What ``torch.compile`` takes from the GPU backends as a constant instead of looking inside.

Imported where it traces, not before: the decorator imports all of its front end, which takes longer than the package.
"""

from __future__ import annotations

import torch

from tde_kernels.backends import cuda, triton


@torch.compiler.assume_constant_result
def cuda_device_refusal(index: int) -> str | None:
    return cuda.device_refusal(index)


@torch.compiler.assume_constant_result
def triton_unavailable(device: torch.device) -> str | None:
    return triton.unavailable(device)
