"""Random requests through continuous batching, against each alone: ``python scripts/bench_batching.py --requests 10000``.

Requests of random lengths, seeds, samplings, guidance, constraints and stops join and leave running batches of a tiny untrained model at
random times; some are cancelled, some cannot be served, some go on from what others have said. The batch reads prompts in chunks, solo runs
at once. Each one's output must be that of its solo run, token for token, and memory must stay what it was after the first tenth. A line per
way of drafting; exit status 1 if any differs.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch

from mmtp.decode.by_medium import DraftsByMedium
from mmtp.decode.constrain import Constrainer, ConstraintError
from mmtp.decode.draft_model import ModelDrafts
from mmtp.decode.drafts import Drafts, HeadDrafts
from mmtp.decode.engine import Engine
from mmtp.decode.jacobi import JacobiDrafts
from mmtp.decode.lookup import LookupDrafts
from mmtp.decode.ngrams import NGramDrafts
from mmtp.decode.refined import RefinedDrafts
from mmtp.decode.sample import Sampling
from mmtp.models.backbone import BackboneConfig
from mmtp.models.heads.base import HeadConfig
from mmtp.models.heads.next import NextHead
from mmtp.models.heads.parallel import ParallelHead
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.heads.synchronized import SynchronizedHead
from mmtp.models.refiner import Refiner
from mmtp.models.unified import UnifiedModel
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.ngrams import NGrams
from mmtp.stream.vocab import MediaEntry, Special, TextEntry, VocabLayout
from mmtp.testing.traffic import Traced, Traffic, stir, trace
from mmtp.types import Modality

LAYOUT = VocabLayout(
    TextEntry("words", 256),
    (
        MediaEntry(Modality.IMAGE, "pictures", codebook_sizes=(40,)),
        MediaEntry(Modality.AUDIO, "sounds", codebook_sizes=(24, 24), delays=(0, 1)),
    ),
    16,
)
BACKBONE = BackboneConfig(width=48, depth=2, num_heads=4, num_kv_heads=2, head_dim=12, mlp_width=64)
WAYS = ("sequential", "synchronized", "parallel", "by medium", "compiled", "refined", "n-grams", "look-up", "model")
LONGEST = 512  # tokens of a row
GROWTH = 64 << 20  # bytes by which a process may grow for other reasons than its requests


def build(head: HeadConfig) -> UnifiedModel:
    """An untrained model."""
    torch.manual_seed(0)
    net = UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE, head=head).build().eval()
    stir(net)
    return net


def engine(way: str, chunk: int) -> Engine:
    """One that drafts in a way, and reads prompts in chunks of so many tokens; "compiled" drafts rows of pictures, in compiled passes."""
    heads: dict[str, HeadConfig] = {
        "sequential": SequentialHead.Config(mtp_depth=3),
        "synchronized": SynchronizedHead.Config(mtp_depth=2, vertical=4),
        "parallel": ParallelHead.Config(mtp_depth=2),
        "by medium": SequentialHead.Config(mtp_depth=3),
        "compiled": SynchronizedHead.Config(mtp_depth=3, vertical=4),
    }
    net = build(heads.get(way, NextHead.Config()))
    if way == "refined":
        net.refiner = Refiner.begin(BACKBONE.width, 32)
        torch.nn.init.normal_(net.refiner.outward, std=0.1)
    if way == "n-grams":
        net.ngrams = written_ngrams(net)
    drafts: dict[str, Drafts] = {
        "by medium": DraftsByMedium(codes=JacobiDrafts(max_drafts=5)),
        "refined": RefinedDrafts(max_drafts=5),
        "n-grams": NGramDrafts(max_drafts=5, least_chance=0.0),
        "look-up": LookupDrafts(max_drafts=3),
        "model": ModelDrafts(net, 2),
    }
    cost = None if way == "by medium" else 0  # the others make all drafts, that there is much to verify
    return Engine(net, exact=True, draft_cost=cost, drafts=drafts.get(way, HeadDrafts()), chunk=chunk, compile=way == "compiled")


def written_ngrams(net: UnifiedModel) -> NGrams:
    """Counts of what a model writes itself."""
    rows = Engine(net).generate_batch([[Special.BOS]] * 64, [Sampling(seed=seed) for seed in range(64)], 48, speculative=False)
    return NGrams.count([np.array(row.tokens) for row in rows], LAYOUT)


def traffic(seed: int) -> Traffic:
    """Requests over the vocabulary, with constraints where llguidance is installed."""
    assert LAYOUT.text is not None
    try:
        compiler = Constrainer(LAYOUT, {i: bytes([i]) for i in range(256)}, list)
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
        constraints = [compiler.regex("[a-c]{2,9}x?"), compiler.choices(["yes", "no", "no way"]), compiler.json_schema(schema)]
    except ConstraintError:
        constraints = []
    return Traffic(StreamGrammar(LAYOUT), seed, constraints)


def line(way: str, found: Traced) -> str:
    """A row of the table."""
    copied, (before, after) = found.copied_tokens / found.prompt_tokens, (n >> 20 for n in found.resident)
    return (
        f"| {way} | {found.ended} | {found.cancelled} | {found.refused} | {len(found.unequal)} | {found.tokens} | {copied:.0%} "
        f"| {found.tokens / found.seconds:.0f} | {found.tokens / found.solo_seconds:.0f} | {found.cache_bytes[0]} → {found.cache_bytes[1]} "
        f"| {before} → {after} |"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table.

    Args:
        argv: arguments; those of the process where none are given.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="in all, divided among the ways of drafting")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--max-lanes", type=int, default=8, help="rows at a time")
    parser.add_argument("--chunk", type=int, default=48, help="tokens of prompts that a pass of the batch reads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    columns = "ended", "cancelled", "refused", "unequal", "tokens", "prompts copied", "tokens/s", "alone", "cache, bytes", "process, MiB"
    print("| drafts | " + " | ".join(columns) + " |\n|---|" + "--:|" * len(columns))
    wrong = 0
    for i, way in enumerate(args.ways):
        batched, alone = (engine(way, chunk) for chunk in (args.chunk, LONGEST))
        count = -(-args.requests // len(args.ways))
        found = trace(batched, traffic(args.seed + i), count, max_lanes=args.max_lanes, context=LONGEST, alone=alone)
        print(line(way, found), flush=True)
        for request in found.unequal[:3]:
            print(f"{way}: differs from its solo run: {request}", file=sys.stderr)
        grown = found.cache_bytes[1] > found.cache_bytes[0] or found.resident[1] > found.resident[0] + GROWTH
        if grown:
            print(f"{way}: memory grew with the number of requests", file=sys.stderr)
        wrong += len(found.unequal) + grown
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
