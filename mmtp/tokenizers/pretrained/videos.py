"""Video quantizers of diffusers. Videos ``[3, frames, h, w]`` in [0, 1] to one codebook's grid ``[1, t, rows, columns]``.

Videos are padded by repeating their last frame and their borders to whole cells and cropped again by ``decode``; nothing is ever
resized. The models see values in [-1, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.tokenizers.pretrained.base import PretrainedError, WrappedQuantizer
from mmtp.types import Modality, TokenizerSpec


class VidTok(WrappedQuantizer):
    """VidTok (Tang et al. 2024, arXiv:2412.13061) as ``diffusers.AutoencoderVidTok``, with FSQ codes and causal in time.

    ``1 + n s`` frames have ``1 + n`` code frames. The whole video passes the networks at once, so memory grows with its length. Models
    with continuous latents, and those that are not causal (they take whole groups of frames only), are refused.
    """

    package = "diffusers"
    model_class = "AutoencoderVidTok"

    @dataclass(frozen=True, kw_only=True)
    class Config(WrappedQuantizer.Config):
        """Configuration of :class:`VidTok`."""

    def _describe(self) -> TokenizerSpec:
        theirs = self.model.config
        if theirs.regularizer != "fsq" or not theirs.is_causal:
            kind = f"regularizer {theirs.regularizer!r}, is_causal {theirs.is_causal}"
            raise PretrainedError(f"VidTok with {kind}: only models with regularizer 'fsq' that are causal have codes of any length")
        side = 2 ** len(self.model.encoder.spatial_ds)
        return TokenizerSpec(
            modality=Modality.VIDEO,
            codebook_sizes=(theirs.codebook_size,),
            downsampling=(self.model.temporal_compression_ratio, side, side),
            channels=theirs.in_channels,
        )

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        frames, height, width = shape
        step, rows, columns = self._facts.downsampling
        return 1 - (1 - frames) // step, -(-height // rows), -(-width // columns)

    def _ids(self, medium: Float[Tensor, "c t h w"], grid: tuple[int, ...]) -> Int[Tensor, "1 t2 rows columns"]:
        step, *sides = self._facts.downsampling
        height, width = (n * side for n, side in zip(grid[1:], sides, strict=True))
        # The model wants the first frame as often as it takes to make a whole step of it, as its ``forward`` has it.
        frames = (step - 1, 1 + (grid[0] - 1) * step - medium.shape[1])
        amounts = (0, width - medium.shape[3], 0, height - medium.shape[2], *frames)
        _, indices = self.model.encode(F.pad(medium[None] * 2 - 1, amounts, mode="replicate"))
        return indices.long()

    def _medium(self, ids: Int[Tensor, "1 t2 rows columns"]) -> Float[Tensor, "c t h w"]:
        return (self.model.decode(ids, decode_from_indices=True)[0] + 1) / 2
