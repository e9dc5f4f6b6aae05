"""Before anything imports triton: where there is no GPU its interpreter runs our kernels, on the CPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
