"""A network that sees colours, in two stages: what tests look with where none has to be trained."""

import torch
import torch.nn.functional as F


def colours(pictures: torch.Tensor) -> list[torch.Tensor]:
    """Pictures ``[b, 3, h, w]`` in [-1, 1] to mean colours of blocks, and their squares."""
    blocks = F.avg_pool2d(pictures, 16)
    seen = torch.cat([blocks, torch.ones_like(blocks), blocks.square()], 1)
    return [seen, F.avg_pool2d(seen, 2)]
