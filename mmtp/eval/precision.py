"""What half precision does to codes: tokenizers encode in float32, and this says what it would cost not to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def bfloat16_difference(tokenizer: Any, media: Sequence[Tensor]) -> list[float]:
    """Share of codes, for each codebook, that differ from float32 where the encoder runs in bfloat16 (autocast).

    The quantizer stays in float32, as in training. A share of it is what to expect where codes are made in bfloat16 for speed, or where
    kernels round otherwise.

    Args:
        tokenizer: a discrete one whose network before the quantizer is its ``encoder``.
        media: what to encode.
    """
    expected = tokenizer.encode(media)
    with in_bfloat16(tokenizer.encoder):
        found = tokenizer.encode(media)
    pairs = [(expected.item(i).flatten(1), found.item(i).flatten(1)) for i in range(len(expected))]
    wanted, given = (torch.cat(side, 1) for side in zip(*pairs, strict=True))
    return (wanted != given).double().mean(1).tolist()


@contextmanager
def in_bfloat16(network: nn.Module) -> Iterator[None]:
    """Lets a network run under bfloat16 autocast, whatever surrounds it, and give float32."""
    forward = network.forward

    def lower(given: Tensor) -> Tensor:
        with torch.autocast(given.device.type, torch.bfloat16):
            return forward(given).float()

    network.forward = lower
    try:
        yield
    finally:
        del network.forward
