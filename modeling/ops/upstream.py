"""The one place that imports mamba-ssm.

The released mamba-ssm cannot be imported without its compiled `selective_scan_cuda`, though the Triton SSD that we
call does not need it. Where that extension is absent an empty module stands in for it during the import.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import Any

CUDA_EXTENSION = "selective_scan_cuda"
"""mamba-ssm's compiled Mamba-1 scan, which nothing here calls."""


@cache
def chunk_scan() -> Callable[..., Any] | None:
    """mamba-ssm's Triton `mamba_chunk_scan_combined`, or None where mamba-ssm is not installed."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return None
    allow_import_without_cuda_extension()
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined


def allow_import_without_cuda_extension() -> None:
    """Let `import mamba_ssm` succeed where its Mamba-1 CUDA extension was not built."""
    if CUDA_EXTENSION not in sys.modules and importlib.util.find_spec(CUDA_EXTENSION) is None:
        sys.modules[CUDA_EXTENSION] = types.ModuleType(CUDA_EXTENSION)
