"""Neural codecs of transformers: EnCodec, DAC, Mimi. Sounds ``[channels, samples]`` in [-1, 1] to residual codes ``[k, frames]``.

Resampling is not theirs: a sound must have ``spec.sample_rate``. The first codebooks of a residual quantizer are those of a
lower bit rate, so ``num_codebooks`` chooses the rate, and ``decode`` takes fewer codebooks than ``encode`` gives.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.tokenizers.pretrained.base import PretrainedError, WrappedQuantizer
from mmtp.tokenizers.pretrained.quick import QuickQuantizer
from mmtp.types import Modality, TokenizerSpec


class Codec(WrappedQuantizer):
    """What the codecs share; subclasses say what their configurations call hop, codebooks and channels."""

    package = "transformers"
    codebooks_key: ClassVar[str] = "num_quantizers"
    hop_key: ClassVar[str] = "hop_length"

    @dataclass(frozen=True, kw_only=True)
    class Config(WrappedQuantizer.Config):
        """Configuration of a codec.

        Attributes:
            num_codebooks: how many codebooks to write, from the first; None is all that the model has.
        """

        num_codebooks: int | None = None

    def _describe(self) -> TokenizerSpec:
        theirs = self.model.config
        most = getattr(theirs, self.codebooks_key)
        least = getattr(theirs, "num_semantic_quantizers", 1)
        count = most if self.config.num_codebooks is None else self.config.num_codebooks
        if not least <= count <= most:
            raise PretrainedError(f"num_codebooks is {count}; this {self.model_class} has {least} to {most}")
        return TokenizerSpec(
            modality=Modality.AUDIO,
            codebook_sizes=(theirs.codebook_size,) * count,
            downsampling=(getattr(theirs, self.hop_key),),
            channels=getattr(theirs, "audio_channels", 1),
            value_range=(-1.0, 1.0),
            sample_rate=float(theirs.sampling_rate),
            residual=True,
        )


class Encodec(QuickQuantizer, Codec):
    """EnCodec (Défossez et al. 2022, arXiv:2210.13438) as ``transformers.EncodecModel``.

    The 24 kHz model. The 48 kHz one normalises each second-long chunk and needs its scales, floats, to decode; codes have no room
    for them, so it is refused.
    """

    model_class = "EncodecModel"

    @dataclass(frozen=True, kw_only=True)
    class Config(Codec.Config):
        """Configuration of :class:`Encodec`."""

    def _describe(self) -> TokenizerSpec:
        theirs = self.model.config
        if theirs.normalize or theirs.chunk_length_s is not None:
            raise PretrainedError("EnCodec with normalize or chunk_length_s (48 kHz) needs scales beside its codes: take the 24 kHz model")
        facts = super()._describe()
        count = self.model.quantizer.get_num_quantizers_for_bandwidth
        # The least bandwidth that has as many codebooks as are wanted; what it has beyond them is cut off.
        self._bandwidth = min(b for b in theirs.target_bandwidths if count(b) >= facts.num_codebooks)
        return facts

    def _ids(self, medium: Float[Tensor, "c t"], grid: tuple[int, ...]) -> Int[Tensor, "k frames"]:
        latents = self.run("encoder", medium[None])
        return self.model.quantizer.encode(latents, self._bandwidth)[: self._facts.num_codebooks, 0]

    def _medium(self, ids: Int[Tensor, "k frames"]) -> Float[Tensor, "c t"]:
        return self.run("decoder", self.model.quantizer.decode(ids[:, None]))[0]


class Dac(QuickQuantizer, Codec):
    """Descript Audio Codec (Kumar et al. 2023, arXiv:2306.06546) as ``transformers.DacModel``.

    Sounds are padded with silence to whole frames, as the library's feature extractor does (the model itself drops the rest). Where a
    stride is odd (the 16 kHz model) its decoder gives a few samples less than whole frames; these are silence.
    """

    model_class = "DacModel"
    codebooks_key = "n_codebooks"

    @dataclass(frozen=True, kw_only=True)
    class Config(Codec.Config):
        """Configuration of :class:`Dac`."""

    def _ids(self, medium: Float[Tensor, "c t"], grid: tuple[int, ...]) -> Int[Tensor, "k frames"]:
        whole = _silence_after(medium, grid[0] * self._facts.downsampling[0])
        count = self._facts.num_codebooks
        return self.model.quantizer(self.run("encoder", whole[None]), count)[1][0]

    def _medium(self, ids: Int[Tensor, "k frames"]) -> Float[Tensor, "c t"]:
        sound = self.run("decoder", self.model.quantizer.from_codes(ids[None])[0])[0]
        return _silence_after(sound, ids.shape[1] * self._facts.downsampling[0])


class Mimi(Codec):
    """Mimi (Défossez et al. 2024, arXiv:2410.00037) as ``transformers.MimiModel``: one semantic codebook, then acoustic ones.

    It has 32 codebooks; Moshi uses the first 8.
    """

    model_class = "MimiModel"
    hop_key = "frame_size"

    @dataclass(frozen=True, kw_only=True)
    class Config(Codec.Config):
        """Configuration of :class:`Mimi`."""

    def _ids(self, medium: Float[Tensor, "c t"], grid: tuple[int, ...]) -> Int[Tensor, "k frames"]:
        self._forget_codebooks()
        return self.model.encode(medium[None], num_quantizers=self._facts.num_codebooks).audio_codes[0]

    def _medium(self, ids: Int[Tensor, "k frames"]) -> Float[Tensor, "c t"]:
        self._forget_codebooks()
        return self.model.decode(ids[None]).audio_values[0]

    def _forget_codebooks(self) -> None:
        """Mimi keeps the codebooks that it once derived from its buffers; loaded weights or another device would go unnoticed."""
        quantizer: Any = self.model.quantizer
        for part in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer):
            for layer in part.layers:
                layer.codebook._embed = None


def _silence_after(sound: Float[Tensor, "c t"], length: int) -> Float[Tensor, "c t2"]:
    return F.pad(sound, (0, length - sound.shape[1]))
