"""What a round of decoding costs by how many drafts its rows make, of a trained model or of a decoder of random weights:
``python scripts/bench_rounds.py emoji-s --data runs/emoji-val``, ``python scripts/bench_rounds.py medium``.

Rows that write codes of pictures or sounds take so many drafts of the pass before each (:mod:`mmtp.decode.jacobi`), as nearly cost nothing
to make, so that what is timed is their verification: of wider passes, more choices, longer grammars. With ``--drafts refined`` they take
those of the model's refiner (:mod:`mmtp.decode.refined`), and their making is timed too. The ways follow each other in turn, so
that what else the machine does hits all alike; a figure is the median over rounds in which all rows have their prompts read and none is
done, in rounds of plain decoding with as many rows. The constants of :mod:`mmtp.decode.costs` are what this prints.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmtp.data.loader import ShardDataset
from mmtp.decode.costs import Price
from mmtp.decode.engine import Engine
from mmtp.decode.jacobi import JacobiDrafts
from mmtp.decode.refined import RefinedDrafts
from mmtp.decode.rows import Request
from mmtp.decode.sample import Sampling
from mmtp.eval.decoding import Prompt, held_out_prompts
from mmtp.models.unified import UnifiedModel
from mmtp.testing.decoders import SIZES, decoder, drawing

DRAFTS = (0, 1, 2, 4, 8)
KINDS = ("draw", "say")
SIDE, CODES = 32, 100
"""Of the picture that a decoder of random weights draws, and how many codes of it."""
WAYS = {"jacobi": JacobiDrafts, "refined": RefinedDrafts}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What rounds of one way cost.

    Attributes:
        compiled: whether passes are compiled.
        rows: that share a pass.
        drafts: of each row.
        milliseconds: of a round, the median.
        ratio: to a round of as many rows without drafts.
        reckoned: the same by the constants.
    """

    compiled: bool
    rows: int
    drafts: int
    milliseconds: float
    ratio: float
    reckoned: float


def reckoned(price: Price, drafts: int, making: float) -> float:
    """Cost of a round by the constants, in plain ones."""
    return 1 + sum(price.next(made) for made in range(drafts)) + drafts * making * price.alone


def measure(
    net: UnifiedModel, prompts: Sequence[Prompt], compiled: bool, rows: int, temperature: float, repeats: int, drafts: str = "jacobi"
) -> list[Cost]:
    """Rounds of every number of drafts, in turn."""
    way = WAYS[drafts]
    engines = {k: Engine(net, compile=compiled, draft_cost=0, drafts=way(max_drafts=max(k, 1))) for k in DRAFTS}
    times: dict[int, list[float]] = {k: [] for k in DRAFTS}
    for repeat in range(1 + repeats):
        for k, engine in engines.items():
            batcher = engine.batcher(max_lanes=rows, context=max(len(p.tokens) + p.max_new_tokens for p in prompts), speculative=k > 0)
            samplings = [Sampling(temperature=temperature, seed=seed) for seed in range(rows)]
            asked = [
                batcher.submit(Request(prefix=p.tokens, sampling=sampling, max_new_tokens=p.max_new_tokens))
                for p, sampling in zip(prompts, samplings, strict=False)
            ]
            while any(row.reading or len(row.tokens) == row.prompt_length for row in asked):
                batcher.step()
            batcher.step()  # in the first round there is nothing yet to carry
            while not any(row.done for row in asked):
                began = time.thread_time()
                batcher.step()
                if repeat and not any(row.done for row in asked):  # the first repeat pays for what later ones do not
                    times[k].append(time.thread_time() - began)
    if not all(times.values()):
        raise SystemExit("rows are done before a round could be timed: give longer prompts' answers")
    costs, medians = engines[0].chooser.costs, {k: statistics.median(found) for k, found in times.items()}
    making = costs.draft if way is RefinedDrafts else 0.0
    return [
        Cost(
            compiled=compiled,
            rows=rows,
            drafts=k,
            milliseconds=1000 * t,
            ratio=t / medians[0],
            reckoned=reckoned(costs.price(rows), k, making),
        )
        for k, t in medians.items()
    ]


def markdown(costs: Sequence[Cost]) -> str:
    """Measured and reckoned, a line per way and number of rows."""
    columns = ["passes", "rows", "plain", *(f"{k} draft{'s' * (k > 1)}" for k in DRAFTS if k)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for compiled, rows in dict.fromkeys((cost.compiled, cost.rows) for cost in costs):
        found = {cost.drafts: cost for cost in costs if (cost.compiled, cost.rows) == (compiled, rows)}
        cells = [f"{found[k].ratio:.2f} ({found[k].reckoned:.2f})" for k in DRAFTS if k]
        lines.append(f"| {'compiled' if compiled else 'torch'} | {rows} | {found[0].milliseconds:.2f} ms | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table.

    Args:
        argv: arguments; those of the process where none are given.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"a model of the zoo, or a folder; or {', '.join(SIZES)}, of random weights")
    parser.add_argument("--data", help="a tokenized data set of it whose prompts ask for pictures or sounds")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--drafts", choices=WAYS, default="jacobi")
    parser.add_argument("--ways", nargs="+", choices=["torch", "compiled"], default=["torch", "compiled"], help="how passes are run")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--json", type=Path, help="file for all figures")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    net = decoder(given.model, given.precision)
    if given.model in SIZES:
        asked = [Prompt("draw", drawing(SIDE), CODES)] * max(given.rows)
    elif given.data is None:
        parser.error(f"--data: of {given.model} prompts are wanted")
    else:
        asked = [p for p in held_out_prompts([ShardDataset(given.data).over(net.config.layout)], 4 * max(given.rows)) if p.kind in KINDS]
    if len(asked) < max(given.rows):
        print(f"{given.data}: has prompts of {len(asked)} pictures or sounds, and {max(given.rows)} rows are wanted", file=sys.stderr)
        return 1
    ways = [way == "compiled" for way in given.ways if way == "torch" or not net.backbone.uncompiled]
    costs = [
        cost
        for compiled in ways
        for rows in given.rows
        for cost in measure(net, asked, compiled, rows, given.temperature, given.repeats, given.drafts)
    ]
    print(f"{given.model}: time of the processor of a round with drafts, in rounds without, and what is reckoned\n\n{markdown(costs)}")
    if given.json is not None:
        given.json.write_text(json.dumps([vars(cost) for cost in costs], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
