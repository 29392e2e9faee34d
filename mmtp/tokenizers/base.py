"""What every tokenizer promises. Read this first: the rest of the library knows tokenizers only through it.

Discrete tokenizers turn media into :class:`~mmtp.types.Codes` and back, continuous ones into :class:`~mmtp.types.Latents`.
They speak of *local* ids, ``0 <= id < codebook_size`` per codebook; what a code is called in a model's vocabulary is the
business of :class:`mmtp.stream.vocab.VocabLayout` alone.

Media are lists of tensors, so that batches may be ragged: pictures ``[3, h, w]``, videos ``[3, frames, h, w]`` and sounds ``[c, t]``
in float, values as ``spec.value_range`` says; text is a list of strings.

The promises, checked by :func:`mmtp.testing.check_tokenizer` for every registered class and every zoo entry:

- ``encode`` of an item gives the same codes whatever else is in the batch, and the same from run to run (float32).
- ``grid(shape)`` and ``num_tokens(shape)`` tell what ``encode`` will give, without running the network.
- ``decode(encode(x))`` has exactly the shape of ``x``; a tokenizer without a way back raises :class:`EncodeOnlyError`.
- ``spec.fingerprint`` changes whenever configuration or weights do.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from mmtp.types import Codes, Latents, MmtpError, TokenizerSpec

Media = Sequence[Float[Tensor, "c *size"]] | Sequence[str]


class EncodeOnlyError(MmtpError):
    """What ``decode`` raises where a tokenizer has no decoder: its codes can be read by a model, not turned back."""


class StreamError(MmtpError):
    """A stream of chunks that cannot be, has ended, or is to end before where it is."""


@runtime_checkable
class Tokenizer(Protocol):
    """What discrete and continuous tokenizers share."""

    @property
    def config(self) -> Any:
        """What it was built from; goes into its folder's ``config.json``."""
        ...

    @property
    def spec(self) -> TokenizerSpec:
        """Modality, codebooks, downsampling, fingerprint."""
        ...

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Grid of codes for a medium of this shape (without channels), without running the network."""
        ...

    def num_tokens(self, shape: Sequence[int]) -> int:
        """Codes (over all codebooks) or latents for a medium of this shape, without running the network."""
        ...


@runtime_checkable
class DiscreteTokenizer(Tokenizer, Protocol):
    """Media to codes and back."""

    def encode(self, media: Any) -> Codes:
        """Codes of a batch of media, in order; grids may differ."""
        ...

    def decode(self, codes: Codes) -> Any:
        """Media of a batch of codes, cropped to ``codes.sizes`` where these are given."""
        ...


@runtime_checkable
class ContinuousTokenizer(Tokenizer, Protocol):
    """Media to one vector per position."""

    def encode(self, media: Any) -> Latents:
        """Latents of a batch of media, in order."""
        ...
