"""Recordings joined to longer ones as a data set: ``python scripts/join_recordings.py prompts-en-train.tar runs/prompts-joined``.

A model of few recordings learns each of them as a whole, words and sound alike. Joined in ever other orders they teach it where the sound
of a word begins and ends; ``--cut`` goes further and joins runs of words from anywhere: Whisper tiny.en (extra ``audio-eval``) says where
words begin, and a recording is cut at the quietest moment nearby. What Whisper hears otherwise than the words that stand beside the
recording is not cut, nor is what stands next to it.

OUT receives ``000000.flac`` and ``000000.json`` for each, as ``mmtp tokenize OUT --caption "{text}"`` reads them; the labels are ``text``
(words as they stand beside the recordings), ``words`` (the same in lower case, without punctuation) and ``timed`` (what is said piece by
piece, and the second at which each begins, as the task ``read`` wants it). Equal arguments give equal files.
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import Path

import soundfile
import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from mmtp.data.media import decode_sound
from mmtp.data.sources import open_source
from mmtp.eval.distortion import resample
from mmtp.eval.speech import Recognizer, normalise
from mmtp.types import Modality

Piece = tuple[Tensor, str]
"""A sound ``[1, t]``, and the words that are said in it."""
Heard = Sequence[tuple[str, float, float]]
"""Words that a recogniser hears, and the seconds at which they begin and end."""

NEAR = 0.06
"""Seconds around the place where Whisper puts the border of two words, among which the quietest is taken."""
FADE = 0.005
"""Seconds over which a cut piece comes and goes."""
DIGITS: dict[str, str] = dict(
    zip("0123456789", ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"), strict=True)
)


def recordings(source: str, label: str, rate: int) -> list[Piece]:
    """Sounds of a source that have words, with these."""
    opened, found = open_source(source, Modality.AUDIO), []
    for item in opened.items():
        sample = opened.read(item)
        if words := sample.labels.get(label):
            found.append((decode_sound(sample.media, sample_rate=rate)[0], words.strip()))
    return found


def listened(whole: Sequence[Piece], rate: int, kept: Path | None) -> list[Heard]:
    """What Whisper hears in every recording, or heard when the file was written.

    Raises:
        SystemExit: the file is about other recordings.
    """
    texts = [text for _, text in whole]
    if kept is not None and kept.exists():
        found = json.loads(kept.read_text())
        if [text for text, _ in found] != texts:
            raise SystemExit(f"{kept}: holds what was heard in other recordings; name another file, or remove it")
        return [words for _, words in found]
    listen = Recognizer()
    heard: list[Heard] = [listen.words(sound, rate) for sound, _ in track(whole, "listening", transient=True)]
    if kept is not None:
        kept.write_text(json.dumps(list(zip(texts, heard, strict=True))) + "\n")
    return heard


def cut(piece: Piece, heard: Heard, rate: int) -> list[Piece]:
    """The words of a recording one by one, as far as they were heard right; what lies between such words stays whole.

    Args:
        piece: the recording.
        heard: in it.
        rate: samples per second.
    """
    sound, text = piece
    words = text.split()
    spoken = [_plain(word) for word, _, _ in heard]
    blocks = SequenceMatcher(None, [_plain(word) for word in words], spoken, autojunk=False).get_matching_blocks()
    found = {block.a + i: block.b + i for block in blocks for i in range(block.size)}
    borders = [0]
    places = [0]
    for i in range(1, len(words)):
        if i - 1 in found and i in found and found[i] == found[i - 1] + 1:
            middle = (heard[found[i - 1]][2] + heard[found[i]][1]) / 2
            place = quietest(sound, int((middle - NEAR) * rate), int((middle + NEAR) * rate), rate)
            if place > places[-1]:
                borders.append(i)
                places.append(place)
    ends = zip([*borders[1:], len(words)], [*places[1:], sound.shape[1]], strict=True)
    return [
        (faded(sound[:, start:stop], rate), " ".join(words[first:last]))
        for first, start, (last, stop) in zip(borders, places, ends, strict=True)
    ]


def quietest(sound: Float[Tensor, "1 t"], first: int, last: int, rate: int) -> int:
    """The sample between two around which a hundredth of a second is quietest."""
    first, last = max(0, first), min(sound.shape[1], last)
    width = rate // 100
    if last - first <= width:
        return (first + last) // 2
    energy = sound[0, first:last].square().unfold(0, width, 1).sum(1)
    return first + int(energy.argmin()) + width // 2


def faded(sound: Float[Tensor, "1 t"], rate: int) -> Float[Tensor, "1 t"]:
    """A sound that begins and ends in silence."""
    sound, width = sound.clone(), min(int(FADE * rate), sound.shape[1] // 2)
    ramp = torch.linspace(0, 1, width)
    sound[:, :width] *= ramp
    sound[:, sound.shape[1] - width :] *= ramp.flip(0)
    return sound


def runs(recordings: Sequence[Sequence[Piece]], draw: random.Random, count: int, longest: int) -> Iterator[Sequence[Piece]]:
    """Runs of at most so many neighbouring pieces, each of another recording; one of many pieces is drawn as much more often.

    Drawing by weight without repeats is that of Efraimidis and Spirakis 2006.
    """
    order = sorted(recordings, key=lambda own: draw.random() ** (1 / len(own)), reverse=True)
    for own in order[:count]:
        first = draw.randrange(len(own))
        yield own[first : first + draw.randint(1, longest)]


def played(sound: Float[Tensor, "1 t"], speed: float, rate: int) -> Float[Tensor, "1 s"]:
    """A sound so many times as fast, its pitch with it (Ko et al., Audio Augmentation for Speech Recognition, Interspeech 2015)."""
    return sound if speed == 1 else resample(sound, round(rate * speed), rate)


def _plain(word: str) -> str:
    plain = " ".join(normalise(word))
    return DIGITS.get(plain, plain)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and joins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a tar or folder of recordings")
    parser.add_argument("out", type=Path)
    parser.add_argument("--label", default="text", help="what holds the words")
    parser.add_argument("--count", type=int, default=2000, help="joined recordings to make")
    parser.add_argument("--parts", type=int, default=4, help="recordings, or runs of words, in one, at most")
    parser.add_argument("--cut", type=int, metavar="N", default=0, help="cut recordings into words, and join runs of at most N of them")
    parser.add_argument(
        "--heard", type=Path, metavar="FILE", help="keep in this file what Whisper hears, so that it listens once for many calls"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="length of a joined recording, at most")
    parser.add_argument("--pause", type=float, default=0.25, help="seconds of silence between two, at most")
    parser.add_argument("--least", type=int, default=2, help="recordings, or runs of words, in one, at least")
    parser.add_argument("--speeds", type=float, nargs="+", default=[1.0], help="play each at one of these; its voice is higher when faster")
    parser.add_argument("--rate", type=int, default=16000, help="samples per second")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    whole = recordings(args.source, args.label, args.rate)
    if args.cut:
        heard = listened(whole, args.rate, args.heard)
        pieces = [cut(piece, words, args.rate) for piece, words in zip(whole, heard, strict=True)]
    else:
        pieces = [[piece] for piece in whole]
    limit = args.seconds * args.rate
    pieces = [kept for own in pieces if (kept := [piece for piece in own if piece[0].shape[1] < limit / 2])]
    if not pieces:
        parser.error(f"{args.source}: no recording of at most {args.seconds / 2:g} s has the label {args.label}")
    args.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(args.seed)
    for number in track(range(args.count), "joining", transient=True):
        sounds: list[Tensor] = []
        words: list[tuple[str, int]] = []  # and the sample at which they begin
        length = 0
        for run in runs(pieces, draw, draw.randint(args.least, max(args.least, args.parts)), max(1, args.cut)):
            pause = torch.zeros(1, draw.randrange(int(args.pause * args.rate) + 1) if sounds else 0)
            if length + pause.shape[1] + sum(sound.shape[1] for sound, _ in run) > limit:
                break
            sounds.append(pause)
            length += pause.shape[1]
            for sound, said in run:
                words.append((said, length))
                sounds.append(sound)
                length += sound.shape[1]
        if not sounds:  # a run of words that is too long by itself
            continue
        text = " ".join(said for said, _ in words)
        speed = draw.choice(args.speeds)
        sound = played(torch.cat(sounds, 1), speed, args.rate)
        soundfile.write(args.out / f"{number:06}.flac", sound[0].numpy(), args.rate)
        timed = [(said, round(start / args.rate / speed, 4)) for said, start in words]
        labels = {args.label: text, "words": " ".join(normalise(text)), "timed": timed}
        (args.out / f"{number:06}.json").write_text(json.dumps(labels) + "\n")
    print(f"{args.out}: joined of {sum(map(len, pieces))} pieces of {len(pieces)} recordings")


if __name__ == "__main__":
    main()
