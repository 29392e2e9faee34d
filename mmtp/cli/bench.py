"""``mmtp bench``: speeds, measured side by side."""

from pathlib import Path
from typing import Literal


def bench(
    what: Literal["decode"],
    model: str,
    /,
    *,
    data: list[Path] | None = None,
    tokenizer: list[str] | None = None,
    prompts: int = 200,
    temperature: list[float] | None = None,
    guidance: float = 1.0,
    verification: Literal["coupling", "rejection"] = "coupling",
    drafts: str = "auto",
    draft_cost: float | None = None,
    cache: Literal["bfloat16", "int8"] | None = None,
    compile: bool = False,
    device: str = "cpu",
    precision: Literal["float32", "bfloat16"] = "float32",
    repeats: int = 1,
    batch: int = 1,
    exact: bool = True,
    threads: int | None = None,
    cpu_time: bool = False,
    json: Path | None = None,
    report: Path | None = None,
    at_least: float | None = None,
) -> int:
    """Time plain and speculative decoding side by side, and compare their output token for token.

    Half of the prompts ask for easy-VQA's pictures, half for its answers; with --data they are the beginnings of its documents, up to
    what a model is to write, as many of each task. Every prompt is decoded by itself, plainly and speculatively in turn, in changing
    order, over the same cache; speeds are medians over prompts, and their ratio is the median of the prompts' own. Beside the tokens that
    a pass gives stands what bounds the gain: what drafts and verification cost per round, in passes of plain decoding.

    The exit code is 1 where any output differs that should not, or a ratio stays below --at-least.

    Args:
        what: decode.
        model: zoo entry, folder or Hub id.
        data: data sets of mmtp tokenize, best ones that nothing was trained on.
        tokenizer: without --data: a zoo entry, folder or Hub id, where the model was trained with one that the zoo does not know under its
            name; may be given several times.
        prompts: how many; with --data of each task.
        temperature: of sampling, 0 is greedy; may be given several times; without it 0 and 1.
        guidance: scale of classifier-free guidance inside pictures, of both ways; 1 is off.
        verification: how drafts are judged; rejection gives other tokens of the same distribution, so that above temperature 0 outputs
            are not equal.
        drafts: where they come from: head (the model's own), ngrams (of text, by the counts of mmtp ngrams), lookup (of text, from the
            stream itself), jacobi (of codes, from the pass before), refined (the same by the model's refiner, see mmtp refiner), or a
            smaller model over the same vocabulary, by its name; auto is ngrams for words, head where the model has none, and refined for
            codes, jacobi where it has none; head+jacobi goes on behind the head's.
        draft_cost: what one more draft costs, in passes of the model; without it that is reckoned from the model. As many are made as pay,
            with 0 all.
        cache: hold keys and values in bfloat16 or int8 instead of what the model computes in: half or a quarter of the memory, more time.
        compile: run the blocks of both ways' passes in one call: on the CPU by kernels compiled for this machine, which needs a C++
            compiler, on an accelerator by kernels that torch.compile has fused, recorded once per shape.
        device: where the model runs: cpu, cuda, cuda:N.
        precision: of weights and activations.
        repeats: timings of each way per prompt; the median counts.
        batch: prompts of a kind that are decoded together, three times as many in turn; speeds are then those of all of them together.
        exact: let plain decoding run its own single-row kernels; by default both ways run the same kernels on the same shapes, and
            only so is output promised to be equal bit for bit.
        threads: cores to use; by default all.
        cpu_time: measure seconds of processors, not of the clock, for machines in use by others; with --threads 1 they are alike.
        json: write the figures to this file.
        report: write speeds and the share of drafts accepted, by modality, offset and direction, to this HTML file, with plots.
        at_least: least ratio of speeds on pictures; with --data on every task.

    Examples:
        mmtp bench decode vqa-s
        mmtp bench decode vqa-s --prompts 20 --temperature 1 --no-exact
        mmtp bench decode vqa-s --prompts 40 --report bench.html
        mmtp bench decode vqa-s --prompts 64 --batch 8
        mmtp bench decode vqa-s --prompts 20 --drafts jacobi --no-exact
        mmtp bench decode runs/emoji/result --data tokens/emoji-val --prompts 24 --threads 1
        mmtp bench decode vqa-s --threads 2 --at-least 1.8 --json bench.json
    """
    import time

    import torch

    from mmtp.cli import CHECK_FAILED
    from mmtp.cli.eval import write_json
    from mmtp.cli.sampling import device_of, drafts_of
    from mmtp.cli.tables import progress_bar, show
    from mmtp.data.loader import ShardDataset
    from mmtp.decode.engine import Engine
    from mmtp.decode.sample import Sampling
    from mmtp.eval.decoding import compare, easy_vqa_prompts, held_out_prompts
    from mmtp.eval.report import write_report
    from mmtp.hub import from_pretrained
    from mmtp.pipeline import Pipeline
    from mmtp.types import MmtpError

    if data and tokenizer:
        raise MmtpError("--tokenizer: prompts of --data are tokens already; leave one of the two out")
    if threads is not None:
        torch.set_num_threads(threads)
    clock = time.process_time if cpu_time else time.perf_counter
    net = from_pretrained(model).eval().to(device_of(device), getattr(torch, precision))
    engine = Engine(net, exact=exact, drafts=drafts_of(drafts), draft_cost=draft_cost, cache=cache, compile=compile, clock=clock)
    with progress_bar("decoding both ways", "prompts") as bar:
        if data:
            asked = held_out_prompts([ShardDataset(path).over(net.config.layout) for path in data], prompts)
        else:
            asked = easy_vqa_prompts(Pipeline.from_pretrained(model, tokenizers=tokenizer), prompts)
        sampling = Sampling(guidance=guidance, verification=verification)
        result = compare(engine, asked, sampling, temperatures=tuple(temperature or (0.0, 1.0)), repeats=repeats, batch=batch, progress=bar)
    settings = {
        "exact": exact,
        "guidance": guidance,
        "verification": verification,
        "drafts": drafts,
        "draft_cost": draft_cost,
        "cache": cache,
        "compile": compile,
        "precision": precision,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "time": "of processors" if cpu_time else "of the clock",
        "device": str(engine.device),
    }
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if value is not None)
    show(
        result.table(f"{model}: plain and speculative decoding in turn; {words}").rich(),
        result.acceptance_table("drafts accepted").rich(),
    )
    kinds = list(dict.fromkeys(prompt.kind for prompt in asked)) if data else ["picture"]
    ratios = {kind: round(result.of(kind).speedup, 3) for kind in kinds}
    if json is not None:
        write_json(json, {"bench": what, "model": model, **settings, "speedup": ratios, **result.to_dict()})
    if report is not None:
        print(write_report(report, f"{model}: plain and speculative decoding", result.sections(), words))
    if exact and verification == "coupling" and not result.all_equal:
        print("speculative output differs from plain output")
        return CHECK_FAILED
    if at_least is not None and min(ratios.values()) < at_least:
        print(f"below the threshold: {min(ratios.values()):.3g} < {at_least:g}")
        return CHECK_FAILED
    return 0
