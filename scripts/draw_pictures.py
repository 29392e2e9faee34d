"""A model's own best drawings as a data set: ``python scripts/draw_pictures.py runs/vqa-s-5/result runs/own --pictures 2400``.

Training on them is rejection-sampling fine-tuning (RAFT, Dong et al., arXiv 2304.06767, algorithm 1), with the model as its own
judge: of several drawings of a caption that one is kept in which the model best reads the caption, and none where it does not read
it with confidence. What guidance and choice bring at a cost, plain sampling learns to give by itself.

OUT receives ``000000.png`` and ``000000.json`` (caption, score in nats) for every picture kept, as ``mmtp tokenize OUT`` reads them. The
same command goes on where it stopped.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from mmtp.data.media import encode_png
from mmtp.data.sources import open_source
from mmtp.decode.sample import Sampling
from mmtp.pipeline import Pipeline

FIRST_SEED = 1_000_000  # far from the seeds that evaluations draw with
BATCH = 24


def captions(source: str) -> list[str]:
    """The captions of a source, one for every input that has one."""
    inputs = open_source(source)
    labels = (inputs.read(item).labels for item in inputs.items())
    return [caption for each in labels if (caption := each.get("caption"))]


def draw(model: Pipeline, words: Sequence[str], first: int, out: Path, *, sampling: Sampling, candidates: int, least: float) -> int:
    """Draws one batch and writes what is good enough; returns how many were.

    Args:
        model: draws and reads.
        words: captions.
        first: number of the first picture.
        out: folder.
        sampling: how; its seed is that of picture 0.
        candidates: drawings of each caption, of which one is kept.
        least: probability that the model must give the caption of a picture.
    """
    samplings = [
        Sampling(temperature=sampling.temperature, top_k=sampling.top_k, guidance=sampling.guidance, seed=sampling.seed + first + i)
        for i in range(len(words))
    ]
    drawn = model.try_draw(words, samplings, speculative=False, candidates=candidates, batch_size=4 * BATCH, max_new_tokens=512)
    finished = [i for i, picture in enumerate(drawn) if picture is not None]
    pictures = [picture for picture in drawn if picture is not None]
    scores = model.caption_scores(pictures, [words[i] for i in finished])
    kept = 0
    for i, picture, score in zip(finished, pictures, scores, strict=True):
        if score >= math.log(least):
            (out / f"{first + i:06}.png").write_bytes(encode_png(picture))
            (out / f"{first + i:06}.json").write_text(json.dumps({"caption": words[i], "score": round(score, 4)}) + "\n")
            kept += 1
    return kept


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", default="easy-vqa:train", help="whose captions are drawn, in turn")
    parser.add_argument("--pictures", type=int, default=2400, help="captions to draw")
    parser.add_argument("--candidates", type=int, default=4, help="drawings of each, of which one is kept")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0, help="scale of classifier-free guidance; 1 is off")
    parser.add_argument("--least", type=float, default=0.9, help="probability that the model must give a picture's caption")
    given = parser.parse_args(arguments)

    model, words = Pipeline.from_pretrained(given.model), captions(given.source)
    sampling = Sampling(temperature=given.temperature, top_k=given.top_k, guidance=given.guidance, seed=FIRST_SEED)
    given.out.mkdir(parents=True, exist_ok=True)
    progress = given.out / "progress"  # without an ending that counts as a medium
    first = int(progress.read_text()) if progress.exists() else 0
    began, drawn, kept = time.monotonic(), 0, 0
    while first < given.pictures:
        batch = [words[i % len(words)] for i in range(first, min(first + BATCH, given.pictures))]
        kept += draw(model, batch, first, given.out, sampling=sampling, candidates=given.candidates, least=given.least)
        first += len(batch)
        drawn += len(batch)
        progress.write_text(str(first))
        left = (given.pictures - first) * (time.monotonic() - began) / drawn
        print(f"{first} of {given.pictures} captions, {kept / drawn:.1%} kept, {left / 60:.0f} minutes left", flush=True)


if __name__ == "__main__":
    main()
