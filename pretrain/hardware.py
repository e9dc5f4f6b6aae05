"""What a device can do: the dtype that a run computes in there, and the peaks that MFU is stated against."""

from __future__ import annotations

import re

import torch

from pretrain.config import RunConfig

GPU_PEAK_TFLOPS = {
    # Dense bf16 with float32 accumulation, from the vendor's datasheets; the longest name that matches counts.
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
}


def peak_tflops(device_name: str | None, stated: float = 0.0) -> tuple[float | None, str]:
    """Dense bf16 peak of one device in TFLOP/s, and what it rests on; None where it is not known.

    `device_name` is torch's, None for a CPU; `stated` (logging.peak_tflops) wins where it is not 0. An unknown GPU has
    no peak rather than a guessed one: a wrong MFU is worse than none.
    """
    if stated:
        return stated, "stated in logging.peak_tflops"
    if device_name is None:
        return None, "no GPU: MFU is not reported"
    matches = [name for name in GPU_PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name)]
    if not matches:
        return None, f"{device_name} is not in the table of peaks: set logging.peak_tflops to have MFU reported"
    best = max(matches, key=len)
    return GPU_PEAK_TFLOPS[best], f"datasheet of {best}, dense bf16"


def device_name(device: torch.device) -> str | None:
    """torch's name of a GPU, None for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def memory_gib(device: torch.device) -> float:
    """Peak GiB in use so far: allocated by torch on a GPU, resident in RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with open("/proc/self/status") as f:
        peak_kib = next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))
    return peak_kib / 2**20


def compute_dtype(cfg: RunConfig, device: torch.device) -> torch.dtype:
    """The dtype of activations and of the weights' working copies."""
    if cfg.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if cfg.precision == "fp32" else torch.bfloat16
