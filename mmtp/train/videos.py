"""Videos for training, kept decoded in memory and mixed by weight: a batch is a function of seed and step alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from mmtp.config import Config, ConfigError
from mmtp.data.errors import DecodeError
from mmtp.data.video import decode_video
from mmtp.train.mix import draw_sources, read_files
from mmtp.train.pictures import STORED, PictureSource, read_pictures, scaled, turned
from mmtp.types import Modality


@dataclass(frozen=True, kw_only=True)
class VideoSource(PictureSource):
    """One source of a mix, and how its clips are made and varied; ``crop`` and ``flips`` are the same for all frames of a clip.

    Attributes:
        media: ``videos``: frames of video files, one after the other; ``still-pictures``: a picture, held for the whole clip;
            ``panned-pictures``: a window that glides evenly over a picture and grows or shrinks, from one drawn crop to another. That is
            the motion of a camera before a photograph: nothing in it moves by itself, and nothing is hidden or comes to light.
    """

    media: Literal["videos", "still-pictures", "panned-pictures"] = "videos"


@dataclass(frozen=True, kw_only=True)
class VideoData(Config):
    """``[data]`` of a video tokenizer's recipe: pixels per side and frames of a training clip, and the sources."""

    sources: tuple[VideoSource, ...]
    size: int = 64
    frames: int = 9

    def __post_init__(self) -> None:
        if self.frames < 1 or self.size < 1:
            raise ValueError(f"frames {self.frames}, size {self.size}: each must be at least 1")


class VideoMix:
    """The videos and pictures of all sources, decoded.

    Args:
        config: the sources.
        data_root: where their relative paths start.
        seed: decides, with the step, which clips a batch holds and how they are cropped and flipped.
        frame_rate: frames per second that videos are brought to; None takes their frames as they are.
        progress: whether to show a bar while reading.

    Raises:
        ConfigError: a source holds nothing that can be read.
        DataError: a source of video files needs PyAV, which is not installed.
    """

    def __init__(self, config: VideoData, data_root: Path, seed: int, *, frame_rate: float | None = None, progress: bool = False) -> None:
        self.config, self.seed = config, seed
        self.videos: list[list[Tensor]] = []
        for source in config.sources:
            if source.media == "videos":
                found = read_videos(source, config.size, data_root, frame_rate=frame_rate, progress=progress)
            else:
                found = [picture[:, None] for picture in read_pictures(source, config.size, data_root, progress=progress)]
            if not found:
                raise ConfigError(f"data.sources: {source.source}: holds nothing that can be read as {source.media}")
            self.videos.append(found)

    def batch(self, step: int, count: int) -> Float[Tensor, "b 3 t h w"]:
        """``count`` clips in [-1, 1]; the last frame of a shorter video is repeated."""
        which, draw = draw_sources(self.config.sources, self.seed, step, count)
        clips = []
        for i in which:
            video = self.videos[i][int(torch.randint(len(self.videos[i]), (), generator=draw))]
            clips.append(clip(video, self.config.sources[i], self.config.size, self.config.frames, draw))
        return torch.stack(clips).float().div_(127.5).sub_(1)


def read_videos(
    source: VideoSource, size: int, data_root: Path, *, frame_rate: float | None = None, progress: bool = False
) -> list[UInt8[Tensor, "3 t h w"]]:
    """Every usable video of a source as bytes, its shorter side at most what training needs. Damaged files are passed over."""
    shorter = size if source.crop == (1.0, 1.0) else STORED * size
    out = []
    for data in read_files(source, Modality.VIDEO, data_root, progress=progress):
        try:
            video = decode_video(data, frame_rate=frame_rate).frames.mul(255).round().to(torch.uint8)
        except DecodeError:
            continue
        out.append(torch.stack([scaled(frame, size, shorter, source.crop) for frame in video.unbind(1)], 1))
    return out


def clip(
    video: UInt8[Tensor, "3 n h w"], source: VideoSource, size: int, frames: int, draw: torch.Generator
) -> UInt8[Tensor, "3 t size size"]:
    """Frames of a video in a random square window, or a window that glides over a picture; brought to ``size``, perhaps turned over."""
    start = int(torch.randint(max(0, video.shape[1] - frames) + 1, (), generator=draw))
    window = _window(video, source, draw)
    if source.media == "panned-pictures":
        out = _glide(video[:, 0], window, _window(video, source, draw), size, frames)
    else:
        out = [_cut(video[:, min(start + t, video.shape[1] - 1)], window, size) for t in range(frames)]
    turn = int(torch.randint(8, (), generator=draw))
    return torch.stack([turned(frame, source.flips, turn) for frame in out], 1)


def _window(video: UInt8[Tensor, "3 n h w"], source: VideoSource, draw: torch.Generator) -> tuple[int, int, int]:
    """Top, left and side of a random square."""
    height, width = video.shape[2:]
    low, high = source.crop
    share, down, across = torch.rand(3, generator=draw).tolist()
    side = max(1, round(min(height, width) * (low + (high - low) * share)))
    return round(down * (height - side)), round(across * (width - side)), side


def _cut(frame: UInt8[Tensor, "3 h w"], window: tuple[int, int, int], size: int) -> UInt8[Tensor, "3 size size"]:
    """A square of a frame, brought to ``size``."""
    top, left, side = window
    part = frame[:, top : top + side, left : left + side]
    return part if side == size else _resized(part, size, size)


def _glide(
    picture: UInt8[Tensor, "3 h w"], first: tuple[int, int, int], last: tuple[int, int, int], size: int, frames: int
) -> list[UInt8[Tensor, "3 size size"]]:
    """Squares of a picture on the way from one to the other, brought to ``size``."""
    height, width = picture.shape[1:]
    # Brought to about the clip's resolution at once, so that reading between pixels leaves nothing out.
    if (scale := size / min(first[2], last[2])) < 1:
        picture = _resized(picture, max(1, round(height * scale)), max(1, round(width * scale)))
    out = []
    for t in range(frames):
        share = t / max(1, frames - 1)
        top, left, side = (a + share * (b - a) for a, b in zip(first, last, strict=True))
        # Where the window lies, in -1 to 1 from edge to edge.
        theta = torch.tensor([[[side / width, 0, (2 * left + side) / width - 1], [0, side / height, (2 * top + side) / height - 1]]])
        grid = F.affine_grid(theta, [1, 3, size, size], align_corners=False)
        moved = F.grid_sample(picture[None].float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        out.append(moved[0].round().to(torch.uint8))
    return out


def _resized(picture: UInt8[Tensor, "3 h w"], height: int, width: int) -> UInt8[Tensor, "3 h2 w2"]:
    batch = picture[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]
