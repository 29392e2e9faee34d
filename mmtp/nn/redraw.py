"""Samples that keep what was drawn before, all rows in one call: the kernel behind :func:`mmtp.decode.sample.redraw`."""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.nn.native import library


def redraw(
    scores: Float[Tensor, "m n"], drawn: Sequence[tuple[int, Tensor | None] | None], numbers: Sequence[tuple[float, float]]
) -> tuple[list[int], Float[Tensor, "m n"]]:
    """A sample of the softmax of each row.

    Args:
        scores: float32, on the CPU.
        drawn: what was drawn before, as index, and its probabilities; without them it was the only one that could have come. None where
            nothing was.
        numbers: two per row, from 0 to below 1: whether what was drawn is kept, and what else is drawn.

    Returns:
        Indices, and the softmax.

    Raises:
        NativeError: this machine cannot compile it.
    """
    p = scores.clone(memory_format=torch.contiguous_format)
    kept = [None if each is None or each[1] is None else each[1].contiguous() for each in drawn]
    given = torch.tensor([-1 if each is None else each[0] for each in drawn])
    of = torch.tensor([0 if each is None else each.data_ptr() for each in kept])
    uniforms, tokens = torch.tensor(numbers, dtype=torch.double), torch.empty(len(drawn), dtype=torch.long)
    _kernel()(p.data_ptr(), *p.shape, given.data_ptr(), of.data_ptr(), uniforms.data_ptr(), tokens.data_ptr())
    return tokens.tolist(), p


@cache
def _kernel() -> Any:
    found = library().mmtp_redraw
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.restype, found.argtypes = None, (pointer, number, number, pointer, pointer, pointer, pointer)
    return found
