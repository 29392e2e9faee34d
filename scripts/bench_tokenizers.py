"""Times encoding and decoding beside ``transformers``: ``python scripts/bench_tokenizers.py --threads 1 2 --what janus encodec dac``.

Each model is built from its configuration with random weights (speed does not depend on them), and its adapter holds the same weights:
equal architecture. Before anything is timed it must be shown that both do the same: the share of equal codes, equal codes of
an item alone and in its batch, and lengths that come back. Then the ways through one case follow each other in turn (A B C D A B
C D ...), so that what else the machine does hits all alike:

- ``transformers``: the model itself, float32, the whole batch in one call;
- ``float32``: the adapter with ``Precision(encode="float32", decode="float32")``;
- ``default``: the adapter as it comes;
- ``bfloat16``: the adapter with ``Precision(encode="bfloat16", decode="bfloat16")``.

Pictures are 256x256, sounds are 1 and 10 seconds long, both of noise. The table has medians, 90th percentiles, CPU time and the speed
against ``transformers``.
"""

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtp.tokenizers.pretrained import Dac, Encodec, JanusVQ, Precision

SIDE = 256
SECONDS = (1, 10)
BATCHES = (1, 8)
WARM_UP, TIMED = 3, 10
WAYS = {
    "transformers": None,
    "float32": Precision(decode="float32"),
    "default": Precision(),
    "bfloat16": Precision(encode="bfloat16", decode="bfloat16"),
}
SETTINGS: dict[str, dict[str, Any]] = {"janus": {"num_patches": SIDE // 16}, "encodec": {}, "dac": {}}
"""What differs from the configurations that transformers itself takes for its default (LlamaGen's VQ-16, EnCodec 24 kHz, DAC 16 kHz)."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What must hold before times are compared.

    Attributes:
        what: model.
        parameters: of the model.
        distinct_codes: how many codes the batch has in its first codebook; where they are few, equal codes say little.
        equal_codes: share of the adapter's codes that are those of transformers, float32 both.
        own_codes: share of transformers' codes that it gives again on another number of threads: what rounding does by itself. One
            other code in an early codebook changes those after it.
        batch_equal: whether an item has the same codes alone and in its batch.
        lengths_equal: whether every medium comes back at its length.
        bfloat16_codes: share of codes that stay the same where encoding is in bfloat16.
        decode_db: signal-to-noise ratio of media decoded in bfloat16 against those in float32 (same codes).
        first_call: seconds that a first call takes longer than the next: making the quick copies.
    """

    what: str
    parameters: int
    distinct_codes: int
    equal_codes: float
    own_codes: float
    batch_equal: bool
    lengths_equal: bool
    bfloat16_codes: float
    decode_db: float
    first_call: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one way through one case, in seconds per call."""

    what: str
    case: str
    task: str
    threads: int
    way: str
    median: float
    p90: float
    cpu: float
    speedup: float


def build(what: str, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A model of transformers with random weights, and an adapter around the same one for every other way (quick copies are made once)."""
    import transformers

    torch.manual_seed(0)
    name, adapter = {"janus": ("JanusVQVAE", JanusVQ), "encodec": ("EncodecModel", Encodec), "dac": ("DacModel", Dac)}[what]
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**settings)).eval()
    if what == "encodec":
        _spread_codebooks(model)
    tokenizers: dict[str, Any] = {}
    for way, precision in WAYS.items():
        if precision is not None:
            tokenizers[way] = adapter.wrap(model)
            tokenizers[way].precision = precision
    return model, tokenizers


def _spread_codebooks(model: Any) -> None:
    """Random codebooks where the latents of EnCodec lie: its own are zeros, with which all codes are equal, whoever makes them."""
    with torch.no_grad():
        latents = model.encoder(torch.stack(media_of("encodec", model, 1, 2)))
        mean = latents.mean((0, 2))
        spread = float((latents - mean[:, None]).std())
        for i, layer in enumerate(model.quantizer.layers):
            layer.codebook.embed.normal_(std=spread).add_(mean if i == 0 else 0)


def media_of(what: str, model: Any, seconds: float, batch: int) -> list[Tensor]:
    """A batch of noise: pictures in [0, 1] that fill the model's grid, or sounds of whole frames."""
    generator = torch.Generator().manual_seed(1)
    if what == "janus":
        side = model.config.num_patches * 2 ** (len(model.config.channel_multiplier) - 1)
        return [torch.rand(3, side, side, generator=generator) for _ in range(batch)]
    hop = model.config.hop_length
    samples = max(1, round(seconds * model.config.sampling_rate / hop)) * hop
    return [torch.rand(1, samples, generator=generator) * 0.2 - 0.1 for _ in range(batch)]


def encode_theirs(what: str, model: Any, batch: Tensor) -> Tensor:
    """Codes ``[b, k, n]`` of a batch, by transformers alone."""
    with torch.no_grad():
        if what == "janus":
            return model.encode(batch * 2 - 1).image_tokens.reshape(len(batch), 1, -1)
        if what == "encodec":
            return model.encode(batch, bandwidth=model.config.target_bandwidths[-1]).audio_codes[0]
        return model.encode(batch).audio_codes


def decode_theirs(what: str, model: Any, codes: Tensor) -> Tensor:
    """Media of codes ``[b, k, n]``, by transformers alone, in its own range."""
    with torch.no_grad():
        if what == "janus":
            return model.decode(codes[:, 0])
        if what == "encodec":
            return model.decode(codes[None], [None]).audio_values
        return model.decode(audio_codes=codes).audio_values


def check(what: str, model: Any, tokenizers: dict[str, Any], *, seconds: float, batch: int) -> Gate:
    """Shows that the model and its adapters do the same, on one batch."""
    media = media_of(what, model, seconds, batch)
    exactly, coarsely = tokenizers["float32"], tokenizers["bfloat16"]
    first = _seconds(lambda: exactly.encode(media[:1])) - _seconds(lambda: exactly.encode(media[:1]))
    codes = exactly.encode(media)
    theirs = torch.cat([encode_theirs(what, model, m[None]) for m in media])
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    otherwise = torch.cat([encode_theirs(what, model, m[None]) for m in media])
    torch.set_num_threads(threads)
    alone = torch.cat([exactly.encode([m]).ids for m in media])
    exact, again = exactly.decode(codes), coarsely.decode(codes)
    half = coarsely.encode(media).ids
    noise = sum(float((a - b).square().sum()) for a, b in zip(exact, again, strict=True))
    power = sum(float((a - a.mean()).square().sum()) for a in exact)
    return Gate(
        what=what,
        parameters=sum(p.numel() for p in model.parameters()),
        distinct_codes=len(codes.ids[:, 0].unique()),
        equal_codes=_share(codes.ids.flatten(2), theirs),
        own_codes=_share(otherwise, theirs),
        batch_equal=torch.equal(codes.ids, alone),
        lengths_equal=all(a.shape == b.shape for a, b in zip(exact, media, strict=True)),
        bfloat16_codes=_share(codes.ids, half),
        decode_db=10 * float(torch.log10(torch.tensor(power / max(noise, 1e-30)))),
        first_call=max(0.0, first),
    )


def time_case(
    what: str, model: Any, tokenizers: dict[str, Any], *, seconds: float, batch: int, threads: int, warm_up: int, timed: int, budget: float
) -> list[Timing]:
    """Times encoding and decoding of one batch, all ways in turn.

    Args:
        what: model.
        model: of transformers.
        tokenizers: the adapters around it, by way.
        seconds: of each sound.
        batch: media of a call.
        threads: of torch.
        warm_up: rounds that are not counted.
        timed: rounds that are.
        budget: seconds after which a case ends early, once three rounds are counted.
    """
    torch.set_num_threads(threads)
    media = media_of(what, model, seconds, batch)
    stacked, codes = torch.stack(media), tokenizers["float32"].encode(media)
    ids = codes.ids.flatten(2)
    case = f"{batch} x " + (f"{media[0].shape[2]}x{media[0].shape[1]}" if what == "janus" else f"{seconds:g} s")
    calls: dict[str, dict[str, Callable[[], Any]]] = {
        "encode": {"transformers": lambda: encode_theirs(what, model, stacked)},
        "decode": {"transformers": lambda: decode_theirs(what, model, ids)},
    }
    for way, tokenizer in tokenizers.items():
        calls["encode"][way], calls["decode"][way] = partial(tokenizer.encode, media), partial(tokenizer.decode, codes)
    timings = []
    for task, ways in calls.items():
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        began = time.monotonic()
        for round_ in range(warm_up + timed):
            if len(times["default"]) >= 3 and time.monotonic() - began > budget:
                break
            for way, call in ways.items():
                wall, cpu = time.perf_counter(), time.process_time()
                call()
                spent = time.perf_counter() - wall, time.process_time() - cpu
                if round_ >= warm_up:
                    times[way].append(spent)
            print(f"\r{what} {case} {task}, {threads} threads: {round_ + 1} of {warm_up + timed}   ", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        base = statistics.median(wall for wall, _ in times["transformers"])
        for way, each in times.items():
            walls = sorted(wall for wall, _ in each)
            timings.append(
                Timing(
                    what=what, case=case, task=task, threads=threads, way=way, median=statistics.median(walls),
                    p90=walls[min(len(walls) - 1, int(0.9 * len(walls)))], cpu=statistics.median(cpu for _, cpu in each),
                    speedup=base / statistics.median(walls),
                )
            )  # fmt: skip
    return timings


def markdown(gates: Sequence[Gate], timings: Sequence[Timing]) -> str:
    """Both tables."""
    lines = [
        "| model | parameters | distinct codes | codes as transformers' | its own on other threads | alone as in a batch | lengths "
        "| codes as in bfloat16 | decode in bfloat16 | first call |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for g in gates:
        shares = f"{g.equal_codes:.2%} | {g.own_codes:.2%} | {_word(g.batch_equal)} | {_word(g.lengths_equal)} | {g.bfloat16_codes:.1%}"
        lines.append(
            f"| {g.what} | {g.parameters / 1e6:.1f} M | {g.distinct_codes} | {shares} | {g.decode_db:.1f} dB | {g.first_call:.2f} s |"
        )
    lines += ["", "| model | media | task | threads | way | median | p90 | CPU | speed |", "|---|---|---|---|---|---|---|---|---|"]
    for t in timings:
        milliseconds = " | ".join(f"{1000 * value:.0f} ms" for value in (t.median, t.p90, t.cpu))
        lines.append(f"| {t.what} | {t.case} | {t.task} | {t.threads} | {t.way} | {milliseconds} | {t.speedup:.2f} × |")
    return "\n".join(lines)


def _share(a: Tensor, b: Tensor) -> float:
    return float((a == b).float().mean())


def _word(value: bool) -> str:
    return "yes" if value else "NO"


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None, settings: dict[str, dict[str, Any]] = SETTINGS) -> None:
    """Reads the command line, checks and times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--seconds", nargs="+", type=float, default=list(SECONDS), help="length of sounds")
    parser.add_argument("--rounds", type=int, default=TIMED, help="timed rounds of each case")
    parser.add_argument("--budget", type=float, default=600, help="seconds after which a case ends early, once three rounds are timed")
    parser.add_argument("--quick", action="store_true", help="batch 1, sounds of 1 s, one warm-up and three timed rounds")
    parser.add_argument("--json", type=Path, help="file for all figures")
    given = parser.parse_args(arguments)
    if given.quick:
        given.batches, given.seconds, given.rounds = [1], [1.0], 3
    warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")

    gates, timings = [], []
    for what in given.what:
        model, tokenizers = build(what, settings[what])
        gates.append(check(what, model, tokenizers, seconds=min(given.seconds), batch=2 if given.quick else 8))
        gate = gates[-1]
        if not (gate.batch_equal and gate.lengths_equal and gate.equal_codes >= min(0.999, gate.own_codes - 0.02)):
            raise SystemExit(f"{what}: the adapter does not do what transformers does, times would say nothing: {gate}")
        for threads in given.threads:
            for batch in given.batches:
                for seconds in given.seconds if what != "janus" else [0.0]:
                    timings += time_case(
                        what, model, tokenizers, seconds=seconds, batch=batch, threads=threads,
                        warm_up=1 if given.quick else WARM_UP, timed=given.rounds, budget=given.budget,
                    )  # fmt: skip
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}\n\n{markdown(gates, timings)}")
    if given.json:
        figures = {"torch": torch.__version__, "gates": [asdict(g) for g in gates], "timings": [asdict(t) for t in timings]}
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
