"""Which arithmetic is quicker on this machine."""

import time
from typing import Literal

import torch

SIZE, REPEATS = 768, 4


def quicker_precision() -> Literal["float32", "bfloat16"]:
    """Times a matrix product in both: processors with AMX multiply bfloat16 several times faster, older ones only emulate it."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    seconds = {}
    for name in ("float32", "bfloat16"):
        matrix = torch.randn(SIZE, SIZE).to(getattr(torch, name))
        _ = matrix @ matrix  # the first call prepares kernels
        began = time.perf_counter()
        for _ in range(REPEATS):
            _ = matrix @ matrix
        seconds[name] = time.perf_counter() - began
    return "bfloat16" if seconds["bfloat16"] < 0.8 * seconds["float32"] else "float32"
