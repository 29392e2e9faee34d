"""Sounds that come and go in chunks: what an audio tokenizer gives offline, at constant memory. A causal one does so frame by frame;
of others the decoder does, as far behind its codes as it sees ahead (:func:`decoder_stream`).

Codes and samples are those of ``encode`` and ``decode``, up to the order in which kernels of another shape add (see ``mmtp.nn.conv1d``)::

    encoder, decoder = EncoderStream(tokenizer), DecoderStream(tokenizer)
    for chunk in microphone:                        # [1, n], any n
        play(decoder.push(encoder.push(chunk)))
    play(decoder.flush(encoder.flush(), samples=encoder.samples))
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmtp.nn.conv1d import reach
from mmtp.tokenizers.audio.codec import SAMPLES_PER_PASS, AudioTokenizer, check_sound
from mmtp.tokenizers.base import StreamError
from mmtp.tokenizers.reference import Reference
from mmtp.tokenizers.stream import ChunkStream


class _Stream(ChunkStream):
    """A stream of a tokenizer's, which counts what has come."""

    def __init__(self, tokenizer: AudioTokenizer) -> None:
        if not tokenizer.config.causal:
            raise StreamError("this tokenizer is not causal: its codes depend on samples to come; encode whole sounds")
        super().__init__()
        self.tokenizer = tokenizer
        self.samples = 0


class EncoderStream(_Stream):
    """Chunks of one sound to codes.

    Attributes:
        samples: samples pushed so far; after ``flush`` the length of the sound.
    """

    def __init__(self, tokenizer: AudioTokenizer) -> None:
        super().__init__(tokenizer)
        self._rest = torch.zeros(1, 0)

    def push(self, chunk: Tensor) -> Int[Tensor, "k frames"]:
        """Codes of the frames that this chunk ``[1, n]``, of any length, completes; what is left over waits for the next.

        Raises:
            AudioShapeError, AudioValueError: as ``encode``; nothing of the chunk is then taken.
            StreamError: the stream has ended.
        """
        self._check_open()
        check_sound(chunk, f"chunk at sample {self.samples}")
        self.samples += chunk.shape[1]
        waiting = torch.cat([self._rest, chunk.detach().to("cpu", torch.float32)], 1)
        whole = waiting.shape[1] - waiting.shape[1] % self.tokenizer.config.downsampling
        self._rest = waiting[:, whole:].clone()
        return self._codes(waiting[:, :whole])

    def flush(self) -> Int[Tensor, "k frames"]:
        """Ends the stream: the code of the last frame, filled up with silence, if one has begun."""
        self._check_open()
        self._ended = True
        return self._codes(F.pad(self._rest, (0, -self._rest.shape[1] % self.tokenizer.config.downsampling)))

    def _codes(self, sound: Float[Tensor, "1 n"]) -> Int[Tensor, "k frames"]:
        tokenizer = self.tokenizer
        codes = [torch.zeros(len(tokenizer.quantizer.codebook_sizes), 0, dtype=torch.long)]
        with Reference(tokenizer):
            for part in _parts(sound, tokenizer, step=tokenizer.config.downsampling):
                latents = tokenizer.encoder(part[None].to(tokenizer.device), self._state)
                codes.append(tokenizer.quantizer(latents.transpose(1, 2)).ids[0].T.cpu())
        return torch.cat(codes, 1)


class DecoderStream(_Stream):
    """Codes of one sound to chunks of it.

    Attributes:
        samples: samples given so far.
        delay: frames by which the sound comes after its codes (the overlap of spectra; 0 for convolutions on the waveform).
    """

    def __init__(self, tokenizer: AudioTokenizer) -> None:
        super().__init__(tokenizer)
        # All that a causal decoder sees of the future.
        self.delay = reach(tokenizer.decoder)[1]
        self._frames = 0

    def push(self, ids: Int[Tensor, "k frames"]) -> Float[Tensor, "1 n"]:
        """The samples that these codes complete.

        Raises:
            AudioCodesError: as ``decode``; nothing is then taken.
            StreamError: the stream has ended.
        """
        self._check_open()
        self.tokenizer.check_codes(ids[None])
        sound = self._sound(ids)
        self.samples += sound.shape[1]
        return sound

    def flush(self, ids: Int[Tensor, "k frames"] | None = None, samples: int | None = None) -> Float[Tensor, "1 n"]:
        """Ends the stream: the samples still to come.

        Args:
            ids: the last codes, where they have not been pushed yet.
            samples: length of the whole sound; without it, it is whole frames. Samples that were given cannot be taken back, so the
                last frame's codes should come with this call.

        Raises:
            AudioCodesError: as ``decode``.
            StreamError: ``samples`` were exceeded already, or the codes are not of as many, or the stream has ended.
        """
        self._check_open()
        ids = torch.zeros(1, 0, dtype=torch.long) if ids is None else ids
        self.tokenizer.check_codes(ids[None])
        most = (self._frames + ids.shape[1]) * self.tokenizer.config.downsampling
        if samples is not None and not self.samples <= samples <= most:
            raise StreamError(f"a stream of {samples} samples cannot end here: {self.samples} were given, its codes are of {most}")
        self._ended = True
        sound = self._sound(ids, silence=self.delay)
        sound = sound if samples is None else sound[:, : sound.shape[1] - (most - samples)]
        self.samples = most if samples is None else samples
        return sound

    def _sound(self, ids: Int[Tensor, "k n"], *, silence: int = 0) -> Float[Tensor, "1 t"]:
        """What these codes complete, and ``silence`` frames of nothing after them."""
        tokenizer, parts = self.tokenizer, []
        with Reference(tokenizer):
            for part in _parts(ids, tokenizer):
                latents = tokenizer.quantizer.lookup(part.T[None].to(tokenizer.device)).transpose(1, 2)
                parts.append(tokenizer.decoder(latents, self._state))
            if silence:
                parts.append(tokenizer.decoder(torch.zeros(1, tokenizer.dim, silence, device=tokenizer.device), self._state))
        self._frames += ids.shape[1]
        return torch.cat([part[0].float().clamp(-1, 1) for part in parts], 1) if parts else torch.zeros(1, 0, device=tokenizer.device)


class WindowDecoderStream(ChunkStream):
    """As :class:`DecoderStream` of a tokenizer that is not causal: samples come when the frames stand that their own frame hangs on.

    A chunk is decoded within these. So that they at most double the work, it has at least as many frames as they are.

    Attributes:
        samples: samples given so far.
        delay: frames by which the sound comes after its codes at least.
    """

    def __init__(self, tokenizer: AudioTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.samples = 0
        self._before, self.delay = reach(tokenizer.decoder)
        self._ids: Int[Tensor, "k n"] | None = None  # of the frames to come, and those before that they hang on
        self._past = 0  # how many of them those are

    def push(self, ids: Int[Tensor, "k frames"]) -> Float[Tensor, "1 n"]:
        """The samples that these codes complete.

        Raises:
            AudioCodesError: as ``decode``; nothing is then taken.
            StreamError: the stream has ended.
        """
        held = self._take(ids)
        ready = held.shape[1] - self.delay
        return self._sound(ready if ready - self._past >= max(1, self._before + self.delay) else self._past)

    def flush(self, ids: Int[Tensor, "k frames"]) -> Float[Tensor, "1 n"]:
        """Ends the stream with the last codes, of which there may be none: the samples still to come.

        Raises:
            AudioCodesError: as ``decode``.
            StreamError: the stream has ended.
        """
        held = self._take(ids)
        self._ended = True
        return self._sound(held.shape[1])

    def _take(self, ids: Int[Tensor, "k frames"]) -> Int[Tensor, "k n"]:
        self._check_open()
        self.tokenizer.check_codes(ids[None])
        self._ids = ids if self._ids is None else torch.cat([self._ids, ids], 1)
        return self._ids

    def _sound(self, stop: int) -> Float[Tensor, "1 t"]:
        """What comes up to a frame of those held."""
        ids, parts, tokenizer = self._ids, [torch.zeros(1, 0, device=self.tokenizer.device)], self.tokenizer
        assert ids is not None
        size = max(1, SAMPLES_PER_PASS // tokenizer.config.downsampling)
        with Reference(tokenizer):
            while self._past < stop:
                end = min(stop, self._past + size)
                after = min(ids.shape[1] - end, self.delay)
                parts.append(tokenizer.decode_within(ids[:, : end + after], self._past, after).clamp(-1, 1))
                gone = max(0, end - self._before)
                ids, stop, self._past = ids[:, gone:], stop - gone, end - gone
        self._ids = ids.clone()
        sound = torch.cat(parts, 1)
        self.samples += sound.shape[1]
        return sound


def decoder_stream(tokenizer: AudioTokenizer) -> DecoderStream | WindowDecoderStream:
    """What decodes a tokenizer's codes as they come."""
    return DecoderStream(tokenizer) if tokenizer.config.causal else WindowDecoderStream(tokenizer)


def _parts(x: Tensor, tokenizer: AudioTokenizer, *, step: int = 1) -> list[Tensor]:
    """Pieces along the last axis that fit into memory, ``step`` to a frame; none of nothing."""
    size = max(1, SAMPLES_PER_PASS // tokenizer.config.downsampling) * step
    return list(x.split(size, -1)) if x.shape[-1] else []
