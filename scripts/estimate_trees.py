"""Whether trees of drafts could pay: ``python scripts/estimate_trees.py --model vqa-s --prompts 20 --threads 1``.

A pass that verifies a tree reads several drafts for one place, each seeing only those that lead to it. The least tree, and the one that
costs the head nothing, has beside each draft of the head the one it held for second best: with coupling the second greatest of
log q + G. Where the first draft that does not stand is one whose second would have, such a tree yields one token more than the chain.

The script decodes with chains and counts how often that is. The gain in tokens per pass is to be compared with what a pass of 1 + 2 D in
place of 1 + D tokens costs, which it times in turn, and with what the same places yield when the chain goes on by Jacobi drafts
(``mmtp bench decode MODEL --drafts head+jacobi``).
"""

import argparse
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmtp.decode.chooser import Chooser
from mmtp.decode.drafts import HeadDrafts
from mmtp.decode.engine import Engine
from mmtp.decode.rows import Choice
from mmtp.decode.sample import Draft, Sampling, warp
from mmtp.eval.decoding import easy_vqa_prompts
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


def main() -> None:
    """Reads the command line, decodes and counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vqa-s")
    parser.add_argument("--prompts", type=int, default=20, help="half ask for pictures, half for answers")
    parser.add_argument(
        "--text", action="store_true", help="let the model write 32 words where it would stop, so that text is measured at all"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    net = from_pretrained(given.model).eval()
    engine = Engine(net, draft_cost=0, drafts=HeadDrafts())
    watching = engine.chooser = Watching(net)
    depth = net.head.mtp_depth
    rounds, rescued, reached, second_at = (Counter[Any]() for _ in range(4))
    tokens = Counter[Any]()
    for i, prompt in enumerate(easy_vqa_prompts(Pipeline.from_pretrained(given.model), given.prompts)):
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
    one, narrow, wide = width_costs(net, (1, 1 + depth, 1 + 2 * depth))
    print(f"passes of {1 + depth} and {1 + 2 * depth} tokens cost {narrow / one:.2f} and {wide / one:.2f} times one of a token\n")
    print("| decodes | temperature | rounds | tokens per pass, chain | with seconds | gain | second right, by offset |")
    print("|---|---|---|---|---|---|---|")
    for key, count in rounds.items():
        chain, tree = tokens[key] / count, (tokens[key] + rescued[key]) / count
        shares = ", ".join(f"{100 * second_at[*key, k] / max(1, reached[*key, k]):.0f} %" for k in range(1, depth + 1))
        print(f"| {key[0]} | {key[1]:g} | {count} | {chain:.2f} | {tree:.2f} | {100 * (tree / chain - 1):.0f} % | {shares} |")


if __name__ == "__main__":
    main()
