"""Pairs for preference learning out of labelled pictures: ``python scripts/make_pairs.py easy-vqa:train runs/pairs --task vqa``.

For ``vqa`` the chosen answer is the true one, the rejected one another answer that the same question has elsewhere in the source (a
question that is always answered alike is left out). For ``draw`` the chosen picture is the one that its caption is of, the rejected one a
picture of another caption.

OUT receives the pictures and two manifests with the same keys, which become the two data sets of a recipe:

    mmtp tokenize runs/pairs/chosen.jsonl --task vqa … --out runs/chosen
    mmtp tokenize runs/pairs/rejected.jsonl --task vqa … --out runs/rejected
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmtp.data.errors import DataError
from mmtp.data.sources import open_source
from mmtp.data.sources.base import Sample

Entry = dict[str, Any]


def answer_pairs(samples: Iterable[tuple[str, Sample]], draw: random.Random) -> Iterable[tuple[Entry, Entry]]:
    """Manifest entries (chosen, rejected) of pictures with questions.

    Args:
        samples: pictures' files and what is known of them.
        draw: chooses among the other answers.
    """
    samples = list(samples)
    known: dict[str, set[str]] = defaultdict(set)
    for _, sample in samples:
        for question, answer in sample.labels.get("questions", []):
            known[question].add(answer)
    for file, sample in samples:
        asked = [(q, a, sorted(known[q] - {a})) for q, a in sample.labels.get("questions", []) if len(known[q]) > 1]
        if asked:
            entry = {"key": sample.key, "image": file}
            yield (
                entry | {"questions": [[question, answer] for question, answer, _ in asked]},
                entry | {"questions": [[question, draw.choice(others)] for question, _, others in asked]},
            )


def picture_pairs(samples: Iterable[tuple[str, Sample]], draw: random.Random) -> Iterable[tuple[Entry, Entry]]:
    """Manifest entries (chosen, rejected) of pictures with captions.

    Args:
        samples: pictures' files and what is known of them.
        draw: chooses among the other pictures.
    """
    told = [(file, sample) for file, sample in samples if sample.labels.get("caption")]
    captions = [sample.labels["caption"] for _, sample in told]
    if len(set(captions)) < 2:
        return
    for (file, sample), caption in zip(told, captions, strict=True):
        other = draw.randrange(len(told))
        while captions[other] == caption:
            other = draw.randrange(len(told))
        entry = {"key": sample.key, "caption": caption}
        yield entry | {"image": file}, entry | {"image": told[other][0]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and writes the pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="what mmtp tokenize takes: easy-vqa:train, a tar, a folder …")
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", choices=("vqa", "draw"), required=True)
    parser.add_argument("--pictures", type=int, help="take the first so many; by default all")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)

    source = open_source(given.source)
    (given.out / "pictures").mkdir(parents=True, exist_ok=True)
    samples = []
    for number, item in enumerate(source.items()[: given.pictures]):
        sample = source.read(item)
        file = f"pictures/{number:06}{Path(item.key).suffix}"
        (given.out / file).write_bytes(sample.media)
        samples.append((file, sample))
    make = {"vqa": answer_pairs, "draw": picture_pairs}[given.task]
    pairs = list(make(samples, random.Random(given.seed)))
    if not pairs:
        raise DataError(f"{given.source}: gives no pairs for {given.task}; its pictures lack labels, or all have the same")
    for name, entries in zip(("chosen", "rejected"), zip(*pairs, strict=True), strict=True):
        (given.out / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    print(f"{given.out}: {len(pairs):,} pairs of inputs, from {len(samples):,} pictures")


if __name__ == "__main__":
    main()
