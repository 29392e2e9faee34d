"""``mmtp bench``: speeds, measured side by side."""

from pathlib import Path
from typing import Literal


def bench(
    what: Literal["decode"],
    model: str,
    /,
    *,
    prompts: int = 200,
    temperature: list[float] | None = None,
    guidance: float = 1.0,
    repeats: int = 1,
    exact: bool = True,
    threads: int | None = None,
    json: Path | None = None,
    report: Path | None = None,
    at_least: float | None = None,
) -> int:
    """Time plain and speculative decoding side by side, and compare their output token for token.

    Half of the prompts ask for pictures, half for answers, one at a time. Every prompt is decoded plainly and speculatively in
    turn, in changing order, over the same cache; speeds are medians over prompts, and their ratio is the median of the prompts' own.

    The exit code is 1 where any output differs, or the ratio on pictures stays below --at-least.

    Args:
        what: decode.
        model: zoo entry, folder or Hub id.
        prompts: how many.
        temperature: of sampling, 0 is greedy; may be given several times; without it 0 and 1.
        guidance: scale of classifier-free guidance inside pictures, of both ways; 1 is off.
        repeats: timings of each way per prompt; the median counts.
        exact: let plain decoding run its own single-row kernels; by default both ways run the same kernels on the same shapes, and
            only so is output promised to be equal bit for bit.
        threads: cores to use; by default all.
        json: write the figures to this file.
        report: write speeds and the share of drafts accepted, by modality, offset and direction, to this HTML file, with plots.
        at_least: least ratio of speeds on pictures.

    Examples:
        mmtp bench decode vqa-s
        mmtp bench decode vqa-s --prompts 20 --temperature 1 --no-exact
        mmtp bench decode vqa-s --prompts 40 --report bench.html
        mmtp bench decode vqa-s --threads 2 --at-least 1.8 --json bench.json
    """
    import torch

    from mmtp.cli import CHECK_FAILED
    from mmtp.cli.eval import write_json
    from mmtp.cli.tables import progress_bar, show
    from mmtp.decode.sample import Sampling
    from mmtp.eval.decoding import compare, easy_vqa_prompts
    from mmtp.eval.report import write_report
    from mmtp.pipeline import Pipeline

    if threads is not None:
        torch.set_num_threads(threads)
    pipeline = Pipeline.from_pretrained(model, exact=exact)
    temperatures = tuple(temperature or (0.0, 1.0))
    with progress_bar("decoding both ways", "prompts") as bar:
        asked = easy_vqa_prompts(pipeline, prompts)
        sampling = Sampling(guidance=guidance)
        result = compare(pipeline.engine, asked, sampling, temperatures=temperatures, repeats=repeats, progress=bar)
    kernels = "same kernels" if exact else "single-row kernels for plain decoding"
    show(
        result.table(f"{model}: plain and speculative decoding in turn, {torch.get_num_threads()} threads, {kernels}").rich(),
        result.acceptance_table("drafts accepted").rich(),
    )
    ratio = result.of("picture").speedup
    if json is not None:
        settings = {
            "model": model,
            "exact": exact,
            "guidance": guidance,
            "threads": torch.get_num_threads(),
            "device": str(pipeline.engine.device),
        }
        write_json(json, {"bench": what, **settings, "picture_speedup": round(ratio, 3), **result.to_dict()})
    if report is not None:
        settings = f"{torch.get_num_threads()} threads, {kernels}, guidance {guidance:g}"
        print(write_report(report, f"{model}: plain and speculative decoding", result.sections(), settings))
    if exact and not result.all_equal:
        print("speculative output differs from plain output")
        return CHECK_FAILED
    if at_least is not None and ratio < at_least:
        print(f"below the threshold: {ratio:.3g} < {at_least:g}")
        return CHECK_FAILED
    return 0
