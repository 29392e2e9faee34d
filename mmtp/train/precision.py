"""Which arithmetic is quicker on this machine."""

from typing import Literal

import torch

from mmtp.nn.peaks import product_flops

SIZE = 768
"""Rows of the product that is timed."""


def quicker_precision() -> Literal["float32", "bfloat16"]:
    """Times a matrix product in both: processors with AMX multiply bfloat16 several times faster, older ones only emulate it."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    full, half = (product_flops(torch.device("cpu"), dtype, SIZE) for dtype in (torch.float32, torch.bfloat16))
    return "bfloat16" if full < 0.8 * half else "float32"
