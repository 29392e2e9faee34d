"""How texts are said: in parts, or word by word. Of tokens alone; the pipeline knows what they sound like."""

from collections.abc import Sequence
from itertools import pairwise

import torch

from mmtp.decode.engine import Engine, Request
from mmtp.decode.sample import Sampling
from mmtp.stream.vocab import CLOSERS, OPENERS
from mmtp.types import MmtpError, Modality, Segment


class SpeakingError(MmtpError):
    """A text that cannot be said as it is asked for."""


def parts(text: str, longest: int) -> list[str]:
    """A text as parts of at most so many words, as equal as they come; 0 leaves it whole.

    Raises:
        SpeakingError: fewer than none are wanted.
    """
    words = text.split()
    if longest < 0:
        raise SpeakingError(f"at_once {longest}: words said at once, at least 1, or 0 for all")
    if not longest or len(words) <= longest:
        return [text]
    count = -(-len(words) // longest)
    borders = [len(words) * i // count for i in range(count + 1)]
    return [" ".join(words[start:stop]) for start, stop in pairwise(borders)]


def joined(sounds: Sequence[Segment | None]) -> Segment | None:
    """Codes of sounds one after the other; None where one is missing, or there are none."""
    ids = [sound.ids for sound in sounds if sound is not None and sound.ids is not None]
    return Segment(Modality.AUDIO, torch.cat(ids, -1)) if ids and len(ids) == len(sounds) else None


def read_words(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    words: Sequence[Sequence[Sequence[int]]],
    samplings: Sequence[Sampling],
    *,
    speculative: bool = True,
    max_new_tokens: int = 4096,
    max_lanes: int = 8,
) -> list[list[int] | None]:
    """Streams in which words stand by turns with their sounds: the words are given, the model says each as its turn comes.

    Args:
        engine: of a model that was trained on documents of the task ``read``.
        prompts: up to where the first word stands; one per text.
        words: of each text, as ids of the vocabulary.
        samplings: of each text.
        speculative: see :meth:`mmtp.decode.engine.Engine.generate`.
        max_new_tokens: behind the prompt, words among them.
        max_lanes: see :meth:`mmtp.decode.engine.Engine.batcher`.

    Returns:
        Prompt, words and sounds; None where the limit came before the last sound's end.
    """
    opener, closer = OPENERS[Modality.AUDIO], CLOSERS[Modality.AUDIO]
    batcher = engine.batcher(
        max_lanes=max(1, max_lanes),
        kept=max(1, max_lanes),  # what a text has so far is the beginning of its next request
        context=max(map(len, prompts), default=0) + max(1, max_new_tokens),
        speculative=speculative,
    )
    read: list[list[int] | None] = [None] * len(prompts)
    running = {}

    def go_on(text: int, place: int, stream: Sequence[int]) -> None:
        """Asks for the sound of a word, if there is one more and room for it."""
        if place == len(words[text]):
            read[text] = list(stream)
            return
        prefix = [*stream, *words[text][place], opener]
        room = max_new_tokens - (len(prefix) - len(prompts[text]))
        if room > 0:
            row = batcher.submit(Request(prefix=prefix, sampling=samplings[text], max_new_tokens=room, stop=(closer,)))
            running[row] = text, place

    for text, prompt in enumerate(prompts):
        go_on(text, 0, prompt)
    while batcher.busy:
        for row in batcher.step():
            text, place = running.pop(row)
            if row.tokens[-1] == closer:
                go_on(text, place + 1, row.tokens)
    return read
