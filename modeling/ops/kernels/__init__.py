"""Our Triton kernels, one operation a file: the kernel and the function that launches it. No autograd in here."""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.ops.kernels.tiles import refusal

OLDEST_GPU = (9, 0)
"""Compute capability from which on the kernels run: Hopper, the first whose copy engine moves tiles. On an A100 the compiler
turns such copies into addresses in registers, spills thousands of bytes of them, and mamba-ssm's scan is the faster one."""
SHARED_KIB = 128
"""Shared memory that the largest kernel takes of a multiprocessor: Blackwell's workstation cards have 99 KiB, H100s and B200s 227."""


def usable(x: Tensor, headdim: int, d_state: int, d_conv: int) -> bool:
    """Whether the mixer's kernels run where `x` lives."""
    return x.is_cuda and why_not(x.device, x.dtype, headdim, d_state, d_conv) is None


def why_not(device: torch.device, dtype: torch.dtype, headdim: int, d_state: int, d_conv: int) -> str | None:
    """Why the plain path runs instead of the mixer's kernels, or None where they do."""
    if device.type != "cuda":
        return "no GPU"
    if torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return f"the GPU is older than compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
    shared_kib = torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024
    if shared_kib < SHARED_KIB:
        return f"a kernel has {shared_kib} KiB of shared memory on this GPU, and the largest needs {SHARED_KIB}"
    if dtype == torch.float32:
        return "float32: the kernels' exact products leave the matrix units, and their tiles the registers"
    return refusal(headdim, d_state, d_conv)
