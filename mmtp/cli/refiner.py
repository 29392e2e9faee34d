"""``mmtp refiner``: a small layer that drafts a model's codes, made from what the model writes."""

from itertools import cycle, product
from pathlib import Path
from typing import Any


def refiner(
    model: Path,
    /,
    *,
    data: list[Path],
    prompts: int = 1000,
    turns: int = 3,
    steps: int = 4000,
    hidden: int = 512,
    temperature: list[float] | None = None,
    guidance: list[float] | None = None,
    compile: bool = False,
    threads: int | None = None,
    seed: int = 0,
) -> int:
    """Make a refiner for a model and keep it in the folder of the model, which then drafts codes of pictures and sounds by it.

    Decoding gives the same output, sooner. The model writes what the data's prompts ask for; the refiner learns from that alone, for some
    turns of writing and learning, and needs no other data. The model's weights stay as they are.

    Args:
        model: folder of a saved model.
        data: data sets of mmtp tokenize, whose prompts are taken; may be given several times.
        prompts: of each task and turn.
        turns: of writing and learning.
        steps: of learning, per turn.
        hidden: numbers between the two products of the layer.
        temperature: at which is written; may be given several times; without it 1, 0.7 and 0.
        guidance: scale of classifier-free guidance, likewise; without it none.
        compile: run passes by kernels compiled for this machine; needs a C++ compiler.
        threads: of the processor; without it as torch has them.
        seed: of weights, of what is written, and of what is drawn from it.

    Examples:
        mmtp refiner runs/emoji/result --data runs/emoji-draw --guidance 1 --guidance 3
        mmtp refiner runs/omni/result --data runs/omni-draw --data runs/speech-words --prompts 500
    """
    import numpy as np
    import torch

    from mmtp.cli.tables import progress_bar
    from mmtp.data.loader import ShardDataset
    from mmtp.decode.rows import Request
    from mmtp.decode.sample import Sampling
    from mmtp.eval.decoding import held_out_prompts
    from mmtp.hub import from_pretrained
    from mmtp.models.refiner import Refiner
    from mmtp.models.unified import REFINER_FILE, UnifiedModel
    from mmtp.train.refine import Rounds, collect, fit
    from mmtp.types import MmtpError, Modality

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
    codes = np.zeros(net.config.layout.size, dtype=bool)
    for slot in net.config.layout.slots:
        if slot.modality is not Modality.TEXT and slot.forced is None:
            for lo, hi in slot.generable:
                codes[lo:hi] = True
    writing = ([row for row in dataset if codes[row.tokens[row.target_mask]].any()] for dataset in datasets)
    asked = [prompt for prompt in held_out_prompts(writing, prompts * turns) if prompt.features is None]
    if not asked:
        raise MmtpError("--data: no document has a model write codes; give data of a task that writes pictures or sounds")
    made = Refiner.begin(net.config.backbone.width, hidden, seed)
    rounds: Rounds | None = None
    ways = cycle(product(temperature or (1.0, 0.7, 0.0), guidance or (1.0,)))
    path = model / REFINER_FILE
    for turn in range(turns):
        requests = [
            Request(
                prefix=prompt.tokens,
                sampling=Sampling(temperature=heat, guidance=scale, seed=seed + turn + i * turns),
                max_new_tokens=prompt.max_new_tokens,
            )
            for i, (prompt, (heat, scale)) in enumerate(zip(asked[turn::turns], ways, strict=False))
        ]
        with progress_bar(f"turn {turn + 1}: writing", "rows") as bar:
            seen, per_pass = collect(net, made, requests, compile, bar)
        rounds = seen if rounds is None else rounds + seen
        print(f"turn {turn + 1}: {len(seen):,} rounds of {len(requests):,} prompts, {per_pass:.2f} tokens per pass", flush=True)
        overlap = 0.0
        with progress_bar(f"turn {turn + 1}: learning", "steps") as bar:
            for step, (loss, each) in enumerate(fit(net, made, rounds, steps, seed=seed + turn), 1):
                overlap += (each - overlap) / min(step, 200)
                bar(step, steps, f"loss {loss:.3f}")
        print(f"turn {turn + 1}: drafts overlap with the model by {overlap:.3f}", flush=True)
        made.save(path)
    print(f"{path}: {sum(weight.numel() for weight in made.parameters):,} parameters, {path.stat().st_size:,} bytes")
    return 0
