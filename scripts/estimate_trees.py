"""Whether trees of drafts could pay: ``python scripts/estimate_trees.py --model emoji-s --data runs/emoji-val --prompts 20 --threads 1``.

A pass that verifies a tree reads several drafts for one place, each seeing only those that lead to it. The least tree, and the one that
costs the drafter nothing, has beside each draft the one that was held for second best: with coupling the second greatest of log q + G.
Where the first draft that does not stand is one whose second would have, such a tree yields one token more than the chain.

The script decodes with chains, by the model's refiner or its head, and counts how often that is. The gain in tokens per pass is to be
compared with what a pass of 1 + 2 D in place of 1 + D tokens costs, for D drafts, which it times in turn.
"""

import argparse
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmtp.data.loader import ShardDataset
from mmtp.decode.chooser import Chooser
from mmtp.decode.drafts import Drafter, HeadDrafts
from mmtp.decode.engine import Engine
from mmtp.decode.refined import RefinedDrafter, RefinedDrafts
from mmtp.decode.rows import Choice
from mmtp.decode.sample import Draft, Sampling, warp
from mmtp.eval.decoding import easy_vqa_prompts, held_out_prompts
from mmtp.hub import from_pretrained
from mmtp.pipeline import Pipeline
from mmtp.types import Modality


class Watching(Chooser):
    """A chooser that notes the second best of every draft: (length of the stream, place) -> (first, second)."""

    seconds: dict[tuple[int, int], tuple[int, int]]

    def propose(self, norm: Any, hidden: Tensor, wanted: list[Choice], exact: bool = False) -> list[Draft]:
        drafts = super().propose(norm, hidden, wanted, exact)
        for choice, draft in zip(wanted, drafts, strict=True):
            self.seconds[len(choice.row.tokens), choice.place] = (draft.token, -1)
        for row, slot, own, scores in self.scores(norm, hidden, wanted, exact):
            settings = row.sampling.of(self.slots[slot].modality)
            for i, each in zip(own, warp(scores.float(), settings), strict=True):
                noise = row.noise.at(wanted[i].place, len(each)) if settings.temperature > 0 else 0
                if len(each) > 1:
                    second = self.logits.token(slot, int((each + noise).topk(2).indices[1]))
                    self.seconds[len(row.tokens), wanted[i].place] = (drafts[i].token, second)
        return drafts


class OneByOne(RefinedDrafts):
    """Drafts by the refiner that a chooser proposes, and so can watch."""

    def begin(self, chooser: Chooser, num_lanes: int, capacity: int, exact: bool = False) -> Drafter:
        drafter = super().begin(chooser, num_lanes, capacity, exact)
        assert isinstance(drafter, RefinedDrafter)
        drafter.compiled = False
        return drafter


def width_costs(net: Any, widths: Sequence[int], context: int = 60, rounds: int = 60) -> list[float]:
    """Median seconds of passes of some widths, taken in turn."""
    cache = Chooser(net).new_cache(net.config.backbone.num_caches, 1, context + max(widths))
    slot = next(i for i, slot in enumerate(net.config.layout.slots) if slot.modality is Modality.TEXT)
    times: dict[int, list[float]] = defaultdict(list)
    for round_ in range(rounds):
        for width in widths:
            cache.lengths = [context]
            places = torch.arange(context, context + width)[None, :, None].expand(1, width, 3)
            began = time.perf_counter()
            with torch.inference_mode():
                embedded = net.embed(torch.zeros(1, width, dtype=torch.long))
                states = net.extend(embedded, places, cache.begin(width), cache.layers, [[slot] * width])
                net.unembedding.weight @ states[0].T  # the choices
            if round_:
                times[width].append(time.perf_counter() - began)
    return [statistics.median(times[width]) for width in widths]


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, decodes and counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vqa-s")
    parser.add_argument("--data", nargs="+", help="data sets whose documents begin with the prompts; the default asks as easy-VQA does")
    parser.add_argument("--prompts", type=int, default=20, help="of each task")
    parser.add_argument("--drafts", choices=["refined", "head"], default="refined")
    parser.add_argument("--draft-cost", type=float, default=0.04, help="in passes, which says how many are made")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    net = from_pretrained(given.model).eval()
    engine = Engine(net, draft_cost=given.draft_cost, drafts=OneByOne() if given.drafts == "refined" else HeadDrafts())
    watching = engine.chooser = Watching(net)
    rounds, rescued, reached, second_at = (Counter[Any]() for _ in range(4))
    tokens, made = Counter[Any](), Counter[Any]()
    if given.data:
        prompts = held_out_prompts([ShardDataset(folder) for folder in given.data], given.prompts)
    else:
        prompts = easy_vqa_prompts(Pipeline.from_pretrained(given.model), 2 * given.prompts)
    for i, prompt in enumerate(prompts):
        for temperature in (0.0, 1.0):
            watching.seconds = {}
            row = engine.generate(prompt.tokens, Sampling(temperature=temperature, seed=i), prompt.max_new_tokens, stop=prompt.stop)
            by_round: dict[int, list[int]] = defaultdict(list)
            for length, place in sorted(watching.seconds):
                by_round[length].append(place)
            key = (prompt.kind, temperature)
            for length, places in by_round.items():
                rounds[key] += 1
                tokens[key] += 1
                made[key] += len(places)
                for place in places:
                    if place >= len(row.tokens):
                        break
                    first, second = watching.seconds[length, place]
                    truth, offset = row.tokens[place], place - length + 1
                    reached[*key, offset] += 1
                    if truth == first:
                        tokens[key] += 1
                        continue
                    second_at[*key, offset] += truth == second
                    rescued[key] += truth == second
                    break
    print("| decodes | temperature | rounds with drafts | drafts | tokens per pass, chain | with seconds | gain | a pass costs more |")
    print("|---|---|---|---|---|---|---|---|")
    for key, count in rounds.items():
        chain, tree, drafts = tokens[key] / count, (tokens[key] + rescued[key]) / count, round(made[key] / count)
        narrow, wide = width_costs(net, (1 + drafts, 1 + 2 * drafts))
        cells = [*key, count, f"{made[key] / count:.1f}", f"{chain:.2f}", f"{tree:.2f}"]
        print("|", " | ".join(map(str, cells)), f"| {100 * (tree / chain - 1):.0f} % | {100 * (wide / narrow - 1):.0f} % |")
    print("\nseconds that are right where the first is reached, by offset:")
    for key in rounds:
        offsets = sorted(k[2] for k in reached if k[:2] == key)
        print(f"{key[0]}, {key[1]:g}:", ", ".join(f"{100 * second_at[*key, k] / reached[*key, k]:.0f} %" for k in offsets))


if __name__ == "__main__":
    main()
