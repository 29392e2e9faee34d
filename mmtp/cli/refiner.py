"""``mmtp refiner``: a small layer by which a model drafts, made from what the model writes."""

from itertools import cycle, product
from pathlib import Path
from typing import Any

EVERY = 20
"""Of so many prompts one is kept to measure by."""


def refiner(
    model: Path,
    /,
    *,
    data: list[Path],
    task: list[str] | None = None,
    prompts: int = 1000,
    turns: int = 3,
    steps: int = 4000,
    hidden: int = 512,
    go_on: bool = False,
    temperature: list[float] | None = None,
    guidance: list[float] | None = None,
    compile: bool = False,
    threads: int | None = None,
    seed: int = 0,
) -> int:
    """Make a refiner for a model and keep it in the model's folder: by it the model drafts what the data has it write, words and codes.

    Decoding gives the same output, sooner. The model writes what the data's prompts ask for; the refiner learns from that alone, for some
    turns of writing and learning, and needs no other data. The model's weights stay as they are.

    The more is written, the better: what counts is how far drafts overlap with the model where they have not learnt, on every twentieth
    of the prompts, which is printed after each turn beside the same where they have. Where the two lie far apart, give more --prompts.

    Args:
        model: folder of a saved model.
        data: data sets of mmtp tokenize, whose prompts are taken; may be given several times.
        task: of which prompts are taken; may be given several times; without it all that the data has.
        prompts: of each task and turn.
        turns: of writing and learning.
        steps: of learning, per turn.
        hidden: numbers between the two products of the layer.
        go_on: begin with the refiner that the model has, as wide as it is.
        temperature: at which is written; may be given several times; without it 1, 0.7 and 0.
        guidance: scale of classifier-free guidance, likewise; without it none.
        compile: run passes by kernels compiled for this machine; needs a C++ compiler.
        threads: of the processor; without it as torch has them.
        seed: of weights, of what is written, and of what is drawn from it.

    Examples:
        mmtp refiner runs/emoji/result --data runs/emoji-draw --guidance 1 --guidance 3
        mmtp refiner runs/omni/result --data runs/omni-draw --data runs/speech-words --task draw --task say
    """
    import torch

    from mmtp.cli.tables import progress_bar
    from mmtp.data.loader import ShardDataset
    from mmtp.decode.rows import Request
    from mmtp.decode.sample import Sampling
    from mmtp.eval.decoding import Prompt, held_out_prompts
    from mmtp.hub import from_pretrained
    from mmtp.models.refiner import Refiner
    from mmtp.models.unified import REFINER_FILE, UnifiedModel
    from mmtp.train.refine import Rounds, collect, fit, overlaps
    from mmtp.types import MmtpError

    if not (model / "config.json").is_file():
        raise MmtpError(f"{model}: is no folder of a saved model, and a refiner is kept in one")
    if min(prompts, turns, steps, hidden) < 1:
        raise MmtpError("--prompts, --turns, --steps and --hidden: at least 1 is wanted of each")
    if threads is not None:
        torch.set_num_threads(threads)
    net: Any = from_pretrained(model)
    if not isinstance(net, UnifiedModel):
        raise MmtpError(f"{model}: is no model but a tokenizer, which drafts nothing")
    net = net.eval().requires_grad_(False)
    datasets = [ShardDataset(path).over(net.config.layout) for path in data]
    asked = [prompt for prompt in held_out_prompts(datasets, prompts * turns) if prompt.features is None]
    if not asked:
        raise MmtpError("--data: no document has a prompt of tokens alone, that the model could go on from")
    known = {prompt.kind for prompt in asked}
    if unknown := set(task or ()) - known:
        raise MmtpError(f"--task {min(unknown)}: the data has {', '.join(sorted(known))}")
    made = net.refiner if go_on else Refiner.begin(net.config.backbone.width, hidden, seed)
    if made is None:
        raise MmtpError(f"{model}: has no refiner to go on with; leave out --go-on")
    rounds: Rounds | None = None
    ways = list(product(temperature or (1.0, 0.7, 0.0), guidance or (1.0,)))
    kinds: dict[str, list[Prompt]] = {}
    for prompt in asked if task is None else [prompt for prompt in asked if prompt.kind in task]:
        kinds.setdefault(prompt.kind, []).append(prompt)
    path = model / REFINER_FILE
    for turn in range(turns):
        requests = [
            Request(
                prefix=prompt.tokens,
                sampling=Sampling(temperature=heat, guidance=scale, seed=seed + turn + i * turns),
                max_new_tokens=prompt.max_new_tokens,
            )
            for alike in kinds.values()
            for i, (prompt, (heat, scale)) in enumerate(zip(alike[turn::turns] or alike, cycle(ways), strict=False))
        ]
        kept = requests[EVERY - 1 :: EVERY]
        learnt = [request for i, request in enumerate(requests, 1) if i % EVERY]
        with progress_bar(f"turn {turn + 1}: writing", "rows") as bar:
            seen, per_pass = collect(net, made, learnt, compile, bar)
        rounds = seen if rounds is None else rounds + seen
        print(f"turn {turn + 1}: {len(seen):,} rounds of {len(learnt):,} prompts, {per_pass:.2f} tokens per pass", flush=True)
        with progress_bar(f"turn {turn + 1}: learning", "steps") as bar:
            for step, (loss, _) in enumerate(fit(net, made, rounds, steps, seed=seed + turn), 1):
                bar(step, steps, f"loss {loss:.3f}")
        made.save(path)
        told = [f"where they have learnt: {_shares(overlaps(net, made, seen))}"]
        if kept:
            others, _ = collect(net, made, kept, compile)
            told.append(f"where they have not: {_shares(overlaps(net, made, others))}")
        print(f"turn {turn + 1}: drafts overlap with the model, {'; '.join(told)}", flush=True)
    print(f"{path}: {sum(weight.numel() for weight in made.parameters):,} parameters, {path.stat().st_size:,} bytes")
    return 0


def _shares(found: dict[str, float]) -> str:
    return ", ".join(f"{medium} {share:.3f}" for medium, share in found.items())
