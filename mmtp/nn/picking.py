"""Tokens by states, all of a pass in one call: last norm, logits, guidance, cuts and noise."""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmtp.nn.native import Matrix, library


class Choosing(ctypes.Structure):
    """How a token is chosen of logits, which are multiplied by ``sharpness``. A top-p of 1 and the others at 0 cut nothing."""

    _fields_ = (*((name, ctypes.c_float) for name in ("sharpness", "top_p", "min_p")), ("top_k", ctypes.c_int64))


class Pick(NamedTuple):
    """A token that is to be chosen.

    Attributes:
        at: of the state that predicts it, as index of all.
        how: it is chosen.
        noise: to be added to the logits; None for none.
        guide: of the state that guides, likewise; None where nothing does.
        weight: of guidance.
    """

    at: int
    how: Choosing
    noise: Float[Tensor, " n"] | None = None
    guide: int | None = None
    weight: float = 1.0


def pick(
    states: Float[Tensor, "m d"],
    gain: Float[Tensor, " d"],
    eps: float,
    packed: Float[Tensor, "p _ n"] | Float[Tensor, "p i2 n 2"],
    outputs: int,
    picks: Sequence[Pick],
    rounded: bool = False,
) -> list[int]:
    """Indices of tokens; each is the same whatever stands beside it.

    Args:
        states: float32, before the last norm.
        gain: of that.
        eps: of that.
        packed: weights of the tokens, as :func:`mmtp.nn.native.laid_out` gives them.
        outputs: tokens.
        picks: what is to be chosen.
        rounded: round states to bfloat16, see :func:`mmtp.nn.native.linear`.
    """
    width, count = states.shape[1], len(picks)
    rows, guides = [each.at for each in picks], []
    for each in picks:
        guides.append(-1 if each.guide is None else len(rows))
        if each.guide is not None:
            rows.append(each.guide)
    begin = states.data_ptr()
    room, tokens = torch.empty(len(rows) * (width + outputs + max(width, outputs))), (ctypes.c_int64 * count)()
    _kernel()(
        Matrix(packed.data_ptr(), width, outputs, packed.dtype == torch.bfloat16, rounded),
        (ctypes.c_void_p * len(rows))(*[begin + 4 * width * row for row in rows]), len(rows), count, gain.data_ptr(), eps,
        (ctypes.c_int64 * count)(*guides), (ctypes.c_float * count)(*[each.weight for each in picks]),
        (Choosing * count)(*[each.how for each in picks]),
        (ctypes.c_void_p * count)(*[None if each.noise is None else each.noise.data_ptr() for each in picks]),
        tokens, room.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return list(tokens)


@cache
def _kernel() -> Any:
    found = library().mmtp_pick
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    found.restype = None
    found.argtypes = (ctypes.POINTER(Matrix), pointer, number, number, pointer, real, *[pointer] * 6, number)
    return found
