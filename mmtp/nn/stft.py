"""Short-time Fourier transform as layers over time: frames of a sound in, frames of a sound out, streaming where causal.

A frame stands for ``hop`` samples and sees a window of ``window`` samples: in the middle of them, or, where causal, ending with them.
"""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.nn.conv1d import State, TimeLayer


class Analysis(TimeLayer):
    """A sound to one spectrum per hop, as features: log magnitude, and real and imaginary part compressed to the 0.3rd power."""

    hann: Tensor

    def __init__(self, window: int, hop: int, *, causal: bool) -> None:
        super().__init__()
        self.window, self.hop = window, hop
        self.channels = 3 * (window // 2 + 1)
        self.padding = _placement(window, hop, causal)
        self.rate = Fraction(1, hop)
        self.register_buffer("hann", torch.hann_window(window), persistent=False)

    def forward(self, x: Float[Tensor, "b 1 t"], state: State | None = None) -> Float[Tensor, "b c n"]:
        frames = self.padded(x.float(), state)[:, 0].unfold(-1, self.window, self.hop)
        spectrum = torch.fft.rfft(frames * self.hann).transpose(1, 2)
        magnitude = spectrum.abs().clamp_min(1e-5)
        compressed = spectrum * magnitude**-0.7
        return torch.cat([magnitude.log(), compressed.real, compressed.imag], 1)


class Extend(TimeLayer):
    """Frames before the first and after the last one, with which every sample of a sound lies in all windows of :class:`Synthesis`.

    They are zeros here, and the network up to the synthesis fills them. A stream has none before its start, being causal, and must be
    given those after its end (``padding[1]`` of them).
    """

    def __init__(self, window: int, hop: int, *, causal: bool) -> None:
        super().__init__()
        before, _ = _placement(window, hop, causal)
        # Window i begins ``before`` samples before hop i. The first that is wanted is the first that ends after the sound has begun,
        # the last one the last that begins before the sound ends.
        self.padding = (-(-(window - before) // hop) - 1, -(-before // hop))

    def forward(self, x: Float[Tensor, "b c n"], state: State | None = None) -> Float[Tensor, "b c n2"]:
        return F.pad(x, self.padding) if state is None else x


class Synthesis(TimeLayer):
    """Frames to sound: magnitude and phase by a linear layer, inverse transform, overlap and add (Vocos, arXiv 2306.00814, section 3).

    Reads frames that :class:`Extend` extended, and gives the samples that lie in all windows that can cover them. The sum of the squared
    windows is then the same in every hop, also at the ends of a sound, and is divided out exactly.
    """

    hann: Tensor
    envelope: Tensor

    def __init__(self, width: int, window: int, hop: int, *, causal: bool) -> None:
        super().__init__()
        self.window, self.hop = window, hop
        self.overlap = window // hop - 1
        # A window in the middle of an even number of hops begins half a hop beside its frame's own.
        self.crop = 0 if causal else self.overlap % 2 * hop // 2
        self.rate = Fraction(hop)
        self.linear = nn.Linear(width, window + 2)
        hann = torch.hann_window(window)
        self.register_buffer("hann", hann, persistent=False)
        self.register_buffer("envelope", rearrange(hann.square(), "(r h) -> r h", h=hop).sum(0), persistent=False)

    def forward(self, x: Float[Tensor, "b c n"], state: State | None = None) -> Float[Tensor, "b 1 t"]:
        log_magnitude, phase = self.linear(x.transpose(1, 2)).float().chunk(2, -1)
        # Early in training a magnitude may run away; no sound in [-1, 1] has more than half of this one.
        spectrum = torch.polar(log_magnitude.clamp(max=math.log(self.window)).exp(), phase)
        frames = torch.fft.irfft(spectrum, n=self.window) * self.hann
        if state is not None:
            frames = torch.cat([state[self], frames], 1) if self in state else frames
            state[self] = frames[:, max(0, frames.shape[1] - self.overlap) :].clone()
        hops = max(0, frames.shape[1] - self.overlap)
        pieces = rearrange(frames, "b n (r h) -> r b n h", h=self.hop)
        # Always added in this order, whatever the chunks of a stream.
        added = sum(piece[:, self.overlap - r :][:, :hops] for r, piece in enumerate(pieces))
        sound = rearrange(added / self.envelope, "b n h -> b 1 (n h)")
        return sound[..., self.crop : sound.shape[-1] - self.crop]


def check_window(window: int, hop: int) -> None:
    """Refuses windows whose squares do not add up evenly over hops."""
    if hop < 2 or hop % 2 or window % hop or window < 2 * hop:
        raise ValueError(f"window {window} with hop {hop}: a window of at least 2 whole hops, and an even hop, are wanted")


def _placement(window: int, hop: int, causal: bool) -> tuple[int, int]:
    """Samples that a frame's window reaches before and after the frame's own hop."""
    rest = window - hop
    return (rest, 0) if causal else (rest // 2, rest // 2)
