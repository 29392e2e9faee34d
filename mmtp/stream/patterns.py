"""In which order the codes of several codebooks stand in a stream.

A pattern is data: one delay per codebook. Delays of 0 give the flat order (all codebooks of a frame, then the next frame);
delays of 0, 1, 2, … give the delay pattern of MusicGen (Copet et al. 2023, "Simple and Controllable Music Generation", section 2.2).
Only codes are written, never fillers, so every pattern is lossless and ``S = K * T`` whatever the delays are.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mmtp.types import MmtpError


class PatternError(MmtpError):
    """Delays that no stream can be written with, or codes that do not fit them."""


@dataclass(frozen=True)
class Pattern:
    """Codebook interleaving: at step ``s`` stand, in order of ``k``, the codes of frame ``s - delays[k]`` that exist.

    Attributes:
        delays: steps by which each codebook lags. The first is 0, so that a step of a sound that goes on starts with codebook 0
            and the end of a sound can be told from its going on.
    """

    delays: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.delays or self.delays[0] != 0 or min(self.delays) < 0:
            raise PatternError(f"delays {list(self.delays)}: one delay of at least 0 per codebook is wanted, the first of them 0")

    @property
    def num_codebooks(self) -> int:
        return len(self.delays)

    @cached_property
    def max_delay(self) -> int:
        return max(self.delays)

    @cached_property
    def ramp_down_starts(self) -> tuple[int, ...]:
        """Whose code shows that the frames have ended, after 1, 2, … ``max_delay`` frames and more.

        Without delays it is (0,): there is no ramp-down, whatever closes the span follows at once.
        """
        if not self.max_delay:
            return (0,)
        starts = []
        for frames in range(1, self.max_delay + 1):
            step = max(frames, min(d for d in self.delays if d))
            starts.append(next(k for k, d in enumerate(self.delays) if step - frames < d <= step))
        return tuple(starts)

    def order(self, frames: int) -> tuple[Int[np.ndarray, " s"], Int[np.ndarray, " s"], Int[np.ndarray, " s"]]:
        """Frame, codebook and step of every code of ``frames`` frames, in stream order (read-only arrays)."""
        return _order(self.delays, frames)

    def interleave(self, codes: Int[Tensor, "b k t"]) -> Int[Tensor, "b s"]:
        """Writes codes in stream order.

        Raises:
            PatternError: the number of codebooks is not that of the pattern.
        """
        if codes.shape[1] != self.num_codebooks:
            raise PatternError(f"codes of {codes.shape[1]} codebooks given to a pattern of {self.num_codebooks}")
        frame, codebook = self._index(codes.shape[2], codes.device)
        return codes[:, codebook, frame]

    def deinterleave(self, stream: Int[Tensor, "b s"]) -> Int[Tensor, "b k t"]:
        """The inverse of :meth:`interleave`.

        Raises:
            PatternError: the stream does not hold whole frames.
        """
        frames, rest = divmod(stream.shape[1], self.num_codebooks)
        if rest:
            raise PatternError(f"{stream.shape[1]} codes are not whole frames of {self.num_codebooks} codebooks")
        frame, codebook = self._index(frames, stream.device)
        codes = stream.new_empty((stream.shape[0], self.num_codebooks, frames))
        codes[:, codebook, frame] = stream
        return codes

    def _index(self, frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
        frame, codebook, _ = self.order(frames)
        return torch.tensor(frame, device=device), torch.tensor(codebook, device=device)


@lru_cache(maxsize=64)
def _order(delays: tuple[int, ...], frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    frame = np.arange(frames + max(delays))[:, None] - np.array(delays)
    step, codebook = np.nonzero((frame >= 0) & (frame < frames))
    out = (frame[step, codebook], codebook, step)
    for array in out:
        array.setflags(write=False)
    return out
