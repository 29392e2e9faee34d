"""What all video tokenizers share: videos of any length and size to codes and back, frame by frame, at constant memory.

Subclasses bring the networks, which are causal: the first frame has codes of its own, and each further code frame stands for ``s`` frames.
Videos pass them one code frame at a time, from the first to the last. So the codes of a stream are those of the whole video, and the
codes of a picture are the first of any video that begins with it, to the bit; memory grows with the size of a frame, not with their number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.config import Config
from mmtp.nn.conv1d import Chain, State
from mmtp.tokenizers.autoencoder import Autoencoder
from mmtp.tokenizers.quantizers import Quantized, QuantizerConfig, refuse_scales
from mmtp.tokenizers.reference import Reference
from mmtp.types import Codes, MmtpError, Modality, TokenizerSpec

LARGEST = 16.0
"""Values above it are not bright but of another scale, such as that of bytes."""


class VideoShapeError(MmtpError):
    """A video that is not ``[3, frames, height, width]`` floats."""


class VideoValueError(MmtpError):
    """A video with a value that is not a number, infinite, or of another scale."""


class VideoCodesError(MmtpError):
    """Codes that are not this tokenizer's."""


@dataclass(frozen=True, kw_only=True)
class VideoConfig(Config):
    """What the configurations of all video tokenizers have.

    Attributes:
        frame_rate: frames per second that files are brought to before they are encoded; None takes them at their own.
        quantizer: any registered quantizer's configuration.
    """

    frame_rate: float | None = None
    quantizer: QuantizerConfig

    def __post_init__(self) -> None:
        if self.frame_rate is not None and not self.frame_rate > 0:
            raise ValueError(f"frame_rate {self.frame_rate:g}: more than 0 is wanted")


class VideoTokenizer(Autoencoder):
    """Encoder, quantizer and decoder between videos ``[3, frames, h, w]`` in [0, 1] and codes ``[k, t, rows, columns]``.

    A video of ``1 + n s`` frames has ``1 + n`` code frames; one of another length is padded by repeating its last frame, and its frames
    to whole cells by repeating their border. ``decode`` crops both again; nothing is ever resized. A picture is a video of one frame.

    Every video passes the networks by itself: a kernel may add in another order where a batch is larger.
    """

    codes_error = VideoCodesError

    def __init__(self, config: VideoConfig, encoder: Chain, decoder: Chain, *, dim: int, cell: tuple[int, int, int]) -> None:
        """Of causal networks ``[b, 3, 1 + n s, h, w] -> [b, dim, 1 + n, rows, columns]`` and back; ``cell`` is (s, height, width)."""
        super().__init__(config, encoder, decoder, dim=dim)
        refuse_scales(self.quantizer, "frames, one after the other")
        self.cell = cell

    @property
    def spec(self) -> TokenizerSpec:
        return TokenizerSpec(
            modality=Modality.VIDEO,
            codebook_sizes=self.quantizer.codebook_sizes,
            downsampling=self.cell,
            channels=3,
            sample_rate=self.config.frame_rate,
            fingerprint=self._fingerprint.of(self.config, self),
        )

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        frames, height, width = shape
        return 1 - (1 - frames) // self.cell[0], -(-height // self.cell[1]), -(-width // self.cell[2])

    def extent(self, grid: Sequence[int]) -> tuple[int, int, int]:
        """Frames, height and width of the video of whole cells that has this grid."""
        frames, rows, columns = grid
        return 1 + (frames - 1) * self.cell[0], rows * self.cell[1], columns * self.cell[2]

    def forward(self, pixels: Float[Tensor, "b 3 t h w"]) -> tuple[Float[Tensor, "b 3 t h w"], Quantized]:
        """Reconstruction of pixels in [-1, 1], ``1 + n s`` frames of whole cells: what training calls."""
        size = pixels.shape[2:]
        if (whole := self.extent(self.grid(size))) != tuple(size):
            given, wanted = ("x".join(map(str, s)) for s in (size, whole))
            raise VideoShapeError(f"videos of {given} (frames, height, width) given, whole cells are wanted: {wanted}")
        latents = self.encoder(pixels)
        quantized = self.quantizer(rearrange(latents, "b d t h w -> b (t h w) d"))
        _, _, t, h, _ = latents.shape
        return self.decoder(rearrange(quantized.latents, "b (t h w) d -> b d t h w", t=t, h=h)).float(), quantized

    def encode(self, media: Sequence[Tensor]) -> Codes:
        """Codes of videos ``[3, frames, h, w]`` with values in [0, 1], in evaluation mode and float32 whatever mode the module is in.

        Raises:
            VideoShapeError: a video is not ``[3, frames, height, width]`` of floats, or has no frames.
            VideoValueError: a value is not finite, or is of another scale.
        """
        for i, video in enumerate(media):
            check_video(video, f"video {i}")
            if video.shape[1] == 0:
                raise VideoShapeError(f"video {i}: has no frames")
        sizes = [tuple(video.shape[1:]) for video in media]
        grids = [self.grid(size) for size in sizes]
        longest = [max((grid[axis] for grid in grids), default=0) for axis in range(3)]
        ids = torch.zeros((len(media), len(self.quantizer.codebook_sizes), *longest), dtype=torch.long)
        for i, (video, (t, h, w)) in enumerate(zip(media, grids, strict=True)):
            ids[i, :, :t, :h, :w] = self.encode_frames(video, {})
        return Codes(ids, _triples(grids), _triples(sizes))

    def decode(self, codes: Codes) -> list[Float[Tensor, "3 _ _ _"]]:
        """Videos with values in [0, 1], cropped to ``codes.sizes`` where these are given.

        Of a residual quantizer's codes the first few codebooks, ``codes.ids[:, :n]``, are the same video at a lower bit rate.

        Raises:
            VideoCodesError: more codebooks than this tokenizer has, or a code outside its codebook.
        """
        self.check_codes(codes.ids)
        videos = [self.decode_frames(codes.item(i), {}) for i in range(len(codes))]
        if codes.sizes is not None:
            videos = [v[:, :t, :h, :w] for v, (t, h, w) in zip(videos, codes.sizes.tolist(), strict=True)]
        return videos

    def encode_frames(self, frames: Float[Tensor, "3 n h w"], state: State) -> Int[Tensor, "k t rows columns"]:
        """Codes of the next frames of a video, which ``state`` knows the past of; it is changed. An empty one is the start.

        The number of frames should make whole code frames; what is short of one is filled up with the last frame.
        """
        parts = []
        with Reference(self):
            for first, stop in self._steps(frames.shape[1], state):
                latents = self.encoder(self._pixels(frames[:, first:stop], stop - first)[None], state)
                ids = self.quantizer(rearrange(latents, "1 d 1 h w -> 1 (h w) d")).ids
                parts.append(rearrange(ids, "1 (h w) k -> k 1 h w", h=latents.shape[3]).cpu())
        return torch.cat(parts, 1)

    def decode_frames(self, ids: Int[Tensor, "k t rows columns"], state: State) -> Float[Tensor, "3 n h w"]:
        """The next frames of a video, in whole cells, with values in [0, 1]; ``state`` as :meth:`encode_frames` has it."""
        parts = []
        with Reference(self):
            for step in ids.split(1, 1):
                latents = self.quantizer.lookup(rearrange(step, "k 1 h w -> 1 (h w) k").to(self.device))
                pixels = self.decoder(rearrange(latents, "1 (h w) d -> 1 d 1 h w", h=step.shape[2]).contiguous(), state)
                parts.append(pixels[0].float().add_(1).div_(2).clamp_(0, 1))
        return torch.cat(parts, 1)

    def _steps(self, count: int, state: State) -> Iterator[tuple[int, int]]:
        """First frame and end of what each code frame stands for; the last may reach beyond the frames that there are."""
        first = 0
        while first < count:
            stop = first + (self.cell[0] if first or state else 1)
            yield first, stop
            first = stop

    def _pixels(self, frames: Float[Tensor, "3 n h w"], count: int) -> Float[Tensor, "3 n2 h2 w2"]:
        """Frames as the encoder sees them: in [-1, 1], the last one repeated, borders repeated to whole cells."""
        _, height, width = (-n % cell for n, cell in zip(frames.shape[1:], self.cell, strict=True))
        part = frames.to(self.device, torch.float32)[None].contiguous()
        return F.pad(part, (0, width, 0, height, 0, count - frames.shape[1]), mode="replicate")[0] * 2 - 1


def check_video(video: Tensor, name: str) -> None:
    """Refuses what is not a video ``[3, frames, h, w]`` of floats in [0, 1] or, as resizing makes them, little beyond. It may be empty.

    Raises:
        VideoShapeError: the shape, the number of channels or the type is another.
        VideoValueError: a value is not finite, or so large that it must be of another scale.
    """
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape[2:] or not video.is_floating_point():
        hint = "; a picture is a video of one frame: picture[:, None]" if video.ndim == 3 and video.shape[0] == 3 else ""
        raise VideoShapeError(f"{name}: {video.dtype} {list(video.shape)} given, floats [3, frames, height, width] wanted{hint}")
    least, most = video.aminmax() if video.numel() else (video.new_zeros(()), video.new_zeros(()))
    if not (least >= -LARGEST and most <= LARGEST):
        channel, frame, row, column = (int(i) for i in (~(video.abs() <= LARGEST)).nonzero()[0])
        value = float(video[channel, frame, row, column])
        where = f"channel {channel} of frame {frame}, row {row}, column {column}"
        raise VideoValueError(f"{name}: {where} is {value:g}, numbers in [0, 1] are wanted")


def _triples(values: Sequence[Sequence[int]]) -> Int[Tensor, "b 3"]:
    return torch.tensor(values, dtype=torch.long).reshape(-1, 3)
