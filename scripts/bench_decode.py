"""Times decoding beside ``transformers``, and passes by their width: ``python scripts/bench_decode.py --threads 2``.

A decoder of random weights, or a zoo entry's, goes on from random words, one token per pass, without drafts. All ways have the same
weights and follow each other in turn (A B C ... A B C ...), so that what else the machine does hits all alike:

- ``mmtp``: :class:`mmtp.decode.engine.Engine`, plain; ``compiled``: the same with compiled passes;
- ``dynamic``, ``static``: ``generate`` of transformers' Qwen3ForCausalLM with its two kinds of cache, greedy.

The last column is the time that memory alone would take for what a token of each row has to read (weights of all blocks and of the words'
logits, keys and values half way), over the median: at its data sheet's rate, or at that of one large sum. Of models that fit into a cache
it says little. On a GPU, with weights that take some milliseconds to be read::

    python scripts/bench_decode.py --model 8b --precision bfloat16 --batch 1 --tokens 256 --alone

The second table says what bounds speculative decoding: a pass over a few tokens is what verifies drafts, and its cost is to be compared
with that of a pass over one. What drafts cost, how many stand and what is gained, ``mmtp bench decode`` measures for a trained model.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmtp.decode.cache import KVCache
from mmtp.decode.engine import Engine
from mmtp.decode.sample import Sampling
from mmtp.models.qwen3 import to_qwen3
from mmtp.models.unified import UnifiedModel
from mmtp.nn.peaks import peak_bandwidth, synchronize
from mmtp.stream.vocab import Special
from mmtp.testing.decoders import SIZES, decoder
from mmtp.types import Modality

PROMPT = 32
WIDTHS = (1, 2, 3, 5, 9, 17)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one way costs.

    Attributes:
        way: ``mmtp``, ``compiled``, ``dynamic``, ``static``, or the width of a pass and how it is run.
        batch: rows.
        median: seconds per token of a row, or per pass.
        least: seconds in the fastest round.
        ratio: median against the first way of the same batch.
        bandwidth: share of the device's that it reaches; of passes by their width 0.
    """

    way: str
    batch: int
    median: float
    least: float
    ratio: float
    bandwidth: float = 0.0


def read_per_token(net: UnifiedModel, batch: int, new_tokens: int) -> int:
    """Bytes of weights, keys and values that a pass over a token of each row has to read, half way."""
    size, layout = net.config.backbone, net.config.layout
    words = max(sum(high - low for low, high in slot.generable) for slot in layout.slots if slot.modality is Modality.TEXT)
    held = batch * (PROMPT + 1 + new_tokens // 2) * size.depth * 2 * size.num_kv_heads * size.head_dim
    return (sum(weight.numel() for weight in net.backbone.parameters()) + words * size.width + held) * net.unembedding.weight.element_size()


def exported(net: UnifiedModel) -> Any:
    """The same decoder in transformers.

    Raises:
        ValueError: it gives other logits.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size, vocab = net.config.backbone, net.config.layout.size
    settings: dict[str, Any] = {"rope_theta": size.rope_theta, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=size.width, num_hidden_layers=size.depth, num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads, head_dim=size.head_dim, intermediate_size=size.mlp_width, rms_norm_eps=size.norm_eps,
        tie_word_embeddings=False, **settings,
    )  # fmt: skip
    other: Any = Qwen3ForCausalLM(config).eval()
    weight = net.unembedding.weight
    other = other.to(weight.device, weight.dtype)
    other.load_state_dict(to_qwen3(net.backbone.state_dict(), size, net.embedding.table.weight, net.unembedding.weight))
    tokens = torch.tensor([prompts(net, 1)[0]], device=weight.device)
    with torch.inference_mode():
        places = torch.arange(tokens.shape[1], device=weight.device)[None, :, None].expand(1, -1, 3)
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=weight.device).tril()[None, None]
        ours = net.backbone.norm(net.backbone(net.embed(tokens), places, mask)) @ net.unembedding.weight.T
        theirs = other(tokens).logits
    if (ours - theirs).abs().max() > (1e-3 if ours.dtype == torch.float32 else 0.1) * theirs.abs().max():
        raise ValueError("the exported weights give other logits")
    return other


def engines_of(net: UnifiedModel) -> dict[str, Engine]:
    """Our ways."""
    return {"mmtp": Engine(net)} | ({} if net.backbone.uncompiled else {"compiled": Engine(net, compile=True)})


def prompts(net: UnifiedModel, batch: int) -> list[list[int]]:
    """Random words."""
    first, last = net.config.layout.text_range
    words = torch.randint(first, last, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    return [[int(Special.BOS), *row] for row in words.tolist()]


def ways_of(net: UnifiedModel, batch: int, new_tokens: int, compared: bool) -> dict[str, Callable[[], int]]:
    """Every way as a call that gives the number of tokens that each row got."""
    given = prompts(net, batch)

    def ours(engine: Engine) -> int:
        rows = engine.generate_batch(given, [Sampling(temperature=0)] * batch, new_tokens, speculative=False)
        return max(len(row.new_tokens) for row in rows)

    ways: dict[str, Callable[[], int]] = {way: partial(ours, engine) for way, engine in engines_of(net).items()}
    if compared:
        other, tokens = exported(net), torch.tensor(given, device=net.unembedding.weight.device)
        for cache in ("dynamic", "static"):

            def theirs(cache: str = cache) -> int:
                settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
                with torch.inference_mode():
                    found = other.generate(tokens, attention_mask=torch.ones_like(tokens), cache_implementation=cache, **settings)
                return found.shape[1] - tokens.shape[1]

            ways[cache] = theirs
    return ways


def passes_of(net: UnifiedModel, batch: int, context: int) -> dict[str, Callable[[], int]]:
    """A pass of every width behind a context, as a call."""
    caches = {
        way: engine.chooser.new_cache(net.config.backbone.depth, batch, context + max(WIDTHS)) for way, engine in engines_of(net).items()
    }
    device = net.unembedding.weight.device
    text = next(i for i, slot in enumerate(net.config.layout.slots) if slot.modality is Modality.TEXT)

    def run(cache: KVCache, width: int) -> int:
        cache.lengths = [context] * batch
        tokens = torch.zeros(batch, width, dtype=torch.long, device=device)
        positions = torch.arange(context, context + width, device=device)[None, :, None].expand(batch, width, 3)
        with torch.inference_mode():
            net.extend(net.embed(tokens), positions, cache.begin(width), cache.layers, [[text] * width] * batch)
        synchronize(device)
        return 1

    return {f"{width}, {way}": partial(run, cache, width) for way, cache in caches.items() for width in WIDTHS}


def timed(ways: dict[str, Callable[[], int]], batch: int, rounds: int, least: float = 0.0) -> list[Cost]:
    """Times all ways in turn; ``least`` is what a token takes where nothing but memory holds it up, in seconds."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(1 + rounds):
        for way, call in ways.items():
            began = time.perf_counter()
            count = call()
            if round_:  # The first pays for what later ones do not.
                times[way].append((time.perf_counter() - began) / max(1, count))
        print(f"\rbatch {batch}: round {round_} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    medians = {way: statistics.median(each) for way, each in times.items()}
    base = next(iter(medians.values()))
    return [
        Cost(way=way, batch=batch, median=medians[way], least=min(each), ratio=medians[way] / base, bandwidth=least / medians[way])
        for way, each in times.items()
    ]  # fmt: skip


def markdown(costs: Sequence[Cost], names: tuple[str, str]) -> str:
    """A table; ``names`` are those of the ways and of what is timed."""
    shares = any(c.bandwidth for c in costs)
    head, line = f"| {names[0]} | batch | {names[1]} | fastest | against the first |", "|---|---|---|---|---|"
    lines = [f"{head} bandwidth |", f"{line}---|"] if shares else [head, line]
    for c in costs:
        row = f"| {c.way} | {c.batch} | {1000 * c.median:.2f} ms | {1000 * c.least:.2f} ms | {c.ratio:.2f} × |"
        lines.append(f"{row} {100 * c.bandwidth:.0f} % |" if shares else row)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help=f"{', '.join(SIZES)}, or a model of the zoo; default small")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per row")
    parser.add_argument("--context", type=int, default=100, help="tokens in the cache before a pass")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default cuda where there is one")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--json", type=Path, help="file for all figures")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    net = decoder(given.model, given.precision, given.device)
    device = net.unembedding.weight.device
    peak = peak_bandwidth(device)
    decoding, passes = [], []
    for batch in given.batch:
        least = read_per_token(net, batch, given.tokens) / peak.rate
        decoding += timed(ways_of(net, batch, given.tokens, not given.alone), batch, given.rounds, least)
        passes += timed(passes_of(net, batch, given.context), batch, 10 * given.rounds)
    machine = f"{platform.machine()}, {given.threads} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, {machine}, {given.precision}, {given.model}: ", end="")
    print(f"{net.num_parameters() / 1e6:.1f} M parameters\n\n{markdown(decoding, ('decodes', 'a token of each row'))}\n")
    print(f"Bandwidth is of {peak.rate / 1e9:,.0f} GB/s ({peak.source}).\n")
    print(markdown(passes, ("tokens in a pass", "pass")))
    if given.json:
        figures = {"decoding": [asdict(cost) for cost in decoding], "passes": [asdict(cost) for cost in passes]}
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
