"""What drafts gain by how large a model is: ``python scripts/bench_sizes.py emoji-s --data runs/emoji-val``.

The models of the zoo are so small that a processor's caches hold them, where every token of a pass costs arithmetic. Larger models are
read from memory for each pass, and while a weight comes several tokens can be multiplied by it. So that nothing but size differs, a trained
model gets wider feed-forward layers, of idle units (:func:`mmtp.testing.decoders.widened`): it writes the same tokens, and its drafts stand
as often. Plain and speculative decoding follow each other in turn, prompt by prompt, as in ``mmtp bench decode``.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mmtp.data.loader import ShardDataset
from mmtp.decode.engine import Engine
from mmtp.eval.decoding import DecodingResult, compare, held_out_prompts
from mmtp.hub import from_pretrained
from mmtp.testing.decoders import widened


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What drafts gain at one size.

    Attributes:
        times: as wide as the feed-forward layers of the trained model are.
        parameters: of the blocks, in millions.
        kind: of the prompts.
        temperature: of sampling.
        equal: prompts whose output is that of plain decoding, and of the smallest size.
        prompts: all of them.
        tokens_per_pass: with drafts.
        cost: of a round with drafts, in passes of plain decoding; the median.
        milliseconds: of a token of plain decoding, the median.
        speed: in speeds of plain decoding, the median.
        behind: the same of what comes behind the first pass, which reads the prompt.
    """

    times: int
    parameters: float
    kind: str
    temperature: float
    equal: int
    prompts: int
    tokens_per_pass: float
    cost: float
    milliseconds: float
    speed: float
    behind: float | None


def gains(times: int, parameters: float, result: DecodingResult, first: DecodingResult) -> list[Gain]:
    """By kind and temperature; ``first`` is what the smallest size gave."""
    found = []
    for kind, temperature in result.groups():
        pairs, others = (each.of(kind, temperature).pairs for each in (result, first))
        found.append(
            Gain(
                times=times,
                parameters=parameters,
                kind=kind,
                temperature=temperature,
                equal=sum(pair.equal and pair.tokens == other.tokens for pair, other in zip(pairs, others, strict=True)),
                prompts=len(pairs),
                tokens_per_pass=result.of(kind, temperature).tokens_per_pass,
                cost=statistics.median(pair.round for pair in pairs),
                milliseconds=statistics.median(1000 * pair.plain.seconds / pair.plain.generated for pair in pairs),
                speed=result.of(kind, temperature).speedup,
                behind=result.of(kind, temperature).behind,
            )
        )
    return found


def behind(gain: Gain) -> str:
    """In words."""
    return "" if gain.behind is None else f"{gain.behind:.2f} ×"


def markdown(found: Sequence[Gain]) -> str:
    """A table."""
    columns = [
        "parameters",
        "decodes",
        "temperature",
        "equal",
        "tokens per pass",
        "cost of a round",
        "a token, plain",
        "speed",
        "behind the prompt",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [
        f"| {g.parameters:.1f} M | {g.kind} | {g.temperature:g} | {g.equal} of {g.prompts} | {g.tokens_per_pass:.2f} | {g.cost:.2f} | "
        f"{g.milliseconds:.2f} ms | {g.speed:.2f} × | {behind(g)} |"
        for g in found
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 1 where an output differs.

    Args:
        argv: arguments; those of the process where none are given.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model of the zoo, or a folder")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="tokenized data sets whose prompts are decoded")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 16, 64], help="as wide as its feed-forward layers are")
    parser.add_argument("--prompts", type=int, default=8, help="of each kind")
    parser.add_argument("--kinds", nargs="+", help="of prompts; all where none are named")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--no-compile", action="store_true", help="passes by torch's kernels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for all figures")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    net = from_pretrained(given.model).eval().to(getattr(torch, given.precision))
    asked = held_out_prompts([ShardDataset(path).over(net.config.layout) for path in given.data], given.prompts)
    asked = [prompt for prompt in asked if given.kinds is None or prompt.kind in given.kinds]
    found: list[Gain] = []
    first: DecodingResult | None = None
    for times in given.times:
        wide = widened(net, times)
        result = compare(Engine(wide, compile=not given.no_compile), asked, temperatures=given.temperature)
        first = first or result
        found += gains(times, sum(weight.numel() for weight in wide.backbone.parameters()) / 1e6, result, first)
        print(f"\r{times} times as wide: done", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"torch {torch.__version__}, {given.threads} threads, {given.precision}, {given.model} and idle units, ", end="")
    print(f"{'torch’s kernels' if given.no_compile else 'compiled passes'}\n\n{markdown(found)}")
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(gain) for gain in found], indent=1) + "\n")
    return 0 if all(gain.equal == gain.prompts for gain in found) else 1


if __name__ == "__main__":
    sys.exit(main())
