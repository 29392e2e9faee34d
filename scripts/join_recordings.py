"""Recordings joined to longer ones as a data set: ``python scripts/join_recordings.py prompts-en-train.tar runs/prompts-joined``.

A model of few recordings learns each of them as a whole, words and sound alike; said one behind the other in ever other orders, they
teach it where the sound of a word begins and ends.

OUT receives ``000000.flac`` and ``000000.json`` (text) for each, as ``mmtp tokenize OUT --caption "{text}"`` reads them. Equal arguments
give equal files.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import soundfile
import torch
from rich.progress import track

from mmtp.data.media import decode_sound
from mmtp.data.sources import open_source
from mmtp.types import Modality


def recordings(source: str, label: str, rate: int, longest: float) -> list[tuple[torch.Tensor, str]]:
    """Sounds ``[1, t]`` of a source that have words and are not too long, with these."""
    opened, found = open_source(source, Modality.AUDIO), []
    for item in opened.items():
        sample = opened.read(item)
        sound, _ = decode_sound(sample.media, sample_rate=rate)
        if (words := sample.labels.get(label)) and sound.shape[1] < longest * rate:
            found.append((sound, words.strip()))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and joins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a tar or folder of recordings")
    parser.add_argument("out", type=Path)
    parser.add_argument("--label", default="text", help="what holds the words")
    parser.add_argument("--count", type=int, default=2000, help="joined recordings to make")
    parser.add_argument("--parts", type=int, default=4, help="recordings in one, at most")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of a joined recording, at most")
    parser.add_argument("--pause", type=float, default=0.25, help="seconds of silence between two, at most")
    parser.add_argument("--rate", type=int, default=16000, help="samples per second")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    parts = recordings(args.source, args.label, args.rate, args.seconds / 2)
    if not parts:
        parser.error(f"{args.source}: no recording of at most {args.seconds / 2:g} s has the label {args.label}")
    args.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(args.seed)
    for number in track(range(args.count), "joining", transient=True):
        sounds, words = [], []
        for sound, said in draw.sample(parts, min(len(parts), draw.randint(2, max(2, args.parts)))):
            pause = torch.zeros(1, draw.randrange(int(args.pause * args.rate) + 1) if sounds else 0)
            if sum(s.shape[1] for s in (*sounds, pause, sound)) > args.seconds * args.rate:
                break
            sounds += [pause, sound]
            words.append(said)
        soundfile.write(args.out / f"{number:06}.flac", torch.cat(sounds, 1)[0].numpy(), args.rate)
        (args.out / f"{number:06}.json").write_text(json.dumps({args.label: " ".join(words)}) + "\n")
    print(f"{args.out}: {args.count} recordings of {len(parts)} parts")


if __name__ == "__main__":
    main()
