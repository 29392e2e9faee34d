"""Sounds that measures of speech take for speech: vowels with a pitch, in syllables."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

RATE = 16000


def voice(seconds: float = 1.5, seed: int = 0, rate: int = RATE) -> Float[Tensor, "1 t"]:
    """Harmonics of a wandering pitch under formants, four syllables a second, with a little breath; peak 0.5."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(int(seconds * rate)) / rate
    pitch = 120 + 20 * torch.sin(2 * math.pi * 0.7 * time + seed)
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / rate
    formants = torch.tensor([[700.0, 1200, 2500], [300, 2200, 3000], [500, 900, 2400]])[(4 * time).long() % 3]
    sound = torch.zeros(len(time))
    for k in range(1, 30):
        gain = (-(((k * pitch)[:, None] - formants) / 150).square()).exp().sum(1)
        sound += gain * torch.sin(k * phase)
    sound = (sound + 0.02 * torch.randn(len(time), generator=generator)) * torch.sin(math.pi * 4 * time).square()
    return 0.5 * (sound / sound.abs().max())[None]
