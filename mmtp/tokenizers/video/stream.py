"""Videos that come and go in chunks: the codes and frames of the whole, to the bit, at constant memory.

The tokenizer itself works code frame by code frame (see ``mmtp.tokenizers.video.clip``), so a stream is only what waits for the next::

    encoder, decoder = EncoderStream(tokenizer), DecoderStream(tokenizer, size=(height, width))
    for chunk in camera:                            # [3, n, height, width], any n
        show(decoder.push(encoder.push(chunk)))
    show(decoder.flush(encoder.flush(), frames=encoder.frames))
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.tokenizers.base import StreamError
from mmtp.tokenizers.stream import ChunkStream
from mmtp.tokenizers.video.clip import VideoShapeError, VideoTokenizer, check_video


class _Stream(ChunkStream):
    """A stream of a tokenizer's, which counts what has come."""

    def __init__(self, tokenizer: VideoTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.frames = 0


class EncoderStream(_Stream):
    """Chunks of one video to codes.

    Attributes:
        frames: frames pushed so far; after ``flush`` the length of the video.
    """

    def __init__(self, tokenizer: VideoTokenizer) -> None:
        super().__init__(tokenizer)
        self._rest: Tensor | None = None

    def push(self, chunk: Tensor) -> Int[Tensor, "k t rows columns"]:
        """Codes of the code frames that this chunk ``[3, n, h, w]``, of any length, completes; what is left over waits for the next.

        Raises:
            VideoShapeError, VideoValueError: as ``encode``, or frames are of another size than those before; nothing is then taken.
            StreamError: the stream has ended.
        """
        self._check_open()
        name = f"chunk at frame {self.frames}"
        check_video(chunk, name)
        rest = chunk[:, :0] if self._rest is None else self._rest
        if chunk.shape[2:] != rest.shape[2:]:
            (height, width), (h, w) = rest.shape[2:], chunk.shape[2:]
            raise VideoShapeError(f"{name}: frames of {h}x{w} pixels given, those before have {height}x{width}")
        waiting = torch.cat([rest, chunk.detach().to("cpu", torch.float32)], 1)
        first = min(waiting.shape[1], 0 if self._state else 1)
        whole = first + (waiting.shape[1] - first) // self.tokenizer.cell[0] * self.tokenizer.cell[0]
        self.frames += chunk.shape[1]
        self._rest = waiting[:, whole:].clone()
        return self._codes(waiting[:, :whole])

    def flush(self) -> Int[Tensor, "k t rows columns"]:
        """Ends the stream: the codes of the last code frame, filled up with its last frame, if one has begun."""
        self._check_open()
        if self._rest is None:
            raise StreamError("nothing was pushed: a video has at least one frame")
        self._ended = True
        return self._codes(self._rest)

    def _codes(self, frames: Float[Tensor, "3 n h w"]) -> Int[Tensor, "k t rows columns"]:
        if frames.shape[1]:
            return self.tokenizer.encode_frames(frames, self._state)
        _, rows, columns = self.tokenizer.grid((1, *frames.shape[2:]))
        return torch.zeros(len(self.tokenizer.quantizer.codebook_sizes), 0, rows, columns, dtype=torch.long)


class DecoderStream(_Stream):
    """Codes of one video to chunks of it.

    Args:
        tokenizer: that made the codes.
        size: (height, width) to which frames are cropped; None gives whole cells.

    Attributes:
        frames: frames given so far.
    """

    def __init__(self, tokenizer: VideoTokenizer, size: tuple[int, int] | None = None) -> None:
        super().__init__(tokenizer)
        self.size = size

    def push(self, ids: Int[Tensor, "k t rows columns"]) -> Float[Tensor, "3 n h w"]:
        """The frames that these codes stand for.

        Raises:
            VideoCodesError: as ``decode``; nothing is then taken.
            StreamError: the stream has ended.
        """
        self._check_open()
        self.tokenizer.check_codes(ids[None])
        frames = self._frames(ids)
        self.frames += frames.shape[1]
        return frames

    def flush(self, ids: Int[Tensor, "k t rows columns"], frames: int) -> Float[Tensor, "3 n h w"]:
        """Ends the stream with its last codes, of which only as many frames are given as the video has.

        Args:
            ids: the last codes; there may be none. Frames that were given cannot be taken back, so the last code frame should come here.
            frames: length of the whole video.

        Raises:
            VideoCodesError: as ``decode``.
            StreamError: ``frames`` were exceeded already, or the codes are not of as many, or the stream has ended.
        """
        self._check_open()
        self.tokenizer.check_codes(ids[None])
        steps = ids.shape[1] * self.tokenizer.cell[0]
        most = self.frames + steps - (self.tokenizer.cell[0] - 1 if steps and not self._state else 0)
        if not self.frames <= frames <= most:
            raise StreamError(f"a stream of {frames} frames cannot end here: {self.frames} were given, its codes are of {most}")
        self._ended = True
        chunk = self._frames(ids)[:, : frames - self.frames]
        self.frames = frames
        return chunk

    def _frames(self, ids: Int[Tensor, "k t rows columns"]) -> Float[Tensor, "3 n h w"]:
        height, width = self.size or self.tokenizer.extent((1, *ids.shape[2:]))[1:]
        if not ids.shape[1]:
            return torch.zeros(3, 0, height, width, device=self.tokenizer.device)
        return self.tokenizer.decode_frames(ids, self._state)[:, :, :height, :width]
