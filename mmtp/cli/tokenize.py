"""``mmtp tokenize``: pictures, videos or sound into shards of tokens."""

from pathlib import Path
from typing import Literal


def tokenize(
    source: str,
    /,
    *,
    tokenizer: str,
    out: Path,
    text: str | None = None,
    task: list[str] | None = None,
    caption: list[str] | None = None,
    size: str | None = None,
    fit: Literal["crop", "stretch"] = "crop",
    questions_per_document: int = 1,
    flips: Literal["none", "horizontal", "vertical", "all"] = "none",
    shifts: int = 0,
    codebooks: int = 0,
    max_dim: int = 64,
    merge: int = 1,
    queries: int = 0,
    max_seconds: float = 3600,
    shard_inputs: int | None = None,
    workers: int | None = None,
    shard_index: int = 0,
    num_shards: int = 1,
) -> int:
    """Turn pictures, videos or sound, and what is said of them, into shards of tokens.

    Running the same command again goes on where it stopped. What cannot be used goes to quarantine.jsonl with a reason, and the
    run goes on.

    Args:
        source: a folder, *.jsonl, *.tar, *.parquet (quote patterns), hf:OWNER/NAME[:SPLIT] or easy-vqa[:SPLIT].
        tokenizer: of the medium: a zoo entry, a folder or a Hub id.
        out: folder of the data set.
        text: the text tokenizer, for tasks that write words.
        task: plain (the medium alone), caption, draw (words, then the picture), say (words, then the speech), vqa (questions and
            answers) or vqa-blind (the same without the medium); may be given several times. Without it: plain.
        caption: how captions are worded, with labels in braces ("{caption}, {style} style"); given several times, tasks that write a
            caption write a document in each. Without it: {caption}.
        size: bring pictures and frames to WIDTHxHEIGHT, or to a square.
        fit: how: crop cuts evenly what hangs over, stretch changes the proportions.
        questions_per_document: how many of a picture's questions share one document (vqa, vqa-blind).
        flips: write mirror images besides each picture, with the same words.
        shifts: write so many slightly moved copies besides each sound, picture and mirror image, with the same words.
        codebooks: write only so many codebooks of a residual tokenizer, from the first on; 0 writes all.
        max_dim: greatest number of cells along one side of a grid.
        merge: vectors of a continuous tokenizer: for models whose projector joins so many cells per side into one token.
        queries: vectors of a continuous tokenizer: for models whose resampler makes so many tokens of any grid.
        max_seconds: longer recordings are put aside.
        shard_inputs: inputs per shard; by default there are about 64 shards of 256 to 65,536 inputs.
        workers: processes on this machine; by default one for each core.
        shard_index: for batch schedulers: make only every NUM_SHARDS-th shard, from this one.
        num_shards: for batch schedulers: how many such commands share the work.

    Examples:
        mmtp tokenize photos/ --tokenizer image-fsq-f8 --out tokens/photos --size 64
        mmtp tokenize easy-vqa --tokenizer image-fsq-f8 --text text-bpe-4k --task vqa --task draw --out tokens/easy-vqa
        mmtp tokenize 'crawl/*.tar' --tokenizer image-fsq-f8 --out tokens/crawl --shard-index $SLURM_PROCID --num-shards 64
    """
    from mmtp.cli.tables import count, progress_bar, reasons
    from mmtp.data.encode import TokenizeConfig
    from mmtp.data.job import tokenize as run
    from mmtp.data.storage import Share

    config = TokenizeConfig(
        tasks=tuple(task or ["plain"]),
        captions=tuple(caption or ["{caption}"]),
        size=parse_size(size) if size is not None else None,
        fit=fit,
        questions_per_document=questions_per_document,
        flips=flips,
        shifts=shifts,
        codebooks=codebooks,
        max_dim=max_dim,
        merge=merge,
        queries=queries,
        max_seconds=max_seconds,
        shard_inputs=shard_inputs,
    )
    with progress_bar("tokenizing", "inputs") as bar:
        outcome = run(
            source,
            out,
            tokenizer=tokenizer,
            text=text,
            config=config,
            workers=workers,
            share=Share(shard_index, num_shards),
            progress=lambda done, total, totals: bar(done, total, f"{count(totals.tokens)} tokens, {totals.quarantined} quarantined"),
        )
    totals = outcome.totals
    rest = "" if outcome.complete else " (other writers are still at work)"
    print(
        f"{out}: {totals.ok:,} ok, {totals.quarantined:,} quarantined{reasons(totals.reasons)}; {totals.rows:,} documents, "
        f"{totals.tokens:,} tokens, {totals.bytes:,} bytes, {outcome.seconds:.1f} s{rest}"
    )
    return 0


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """(height, width) of ``"64"`` or ``"WIDTHxHEIGHT"``, which an option was given.

    Raises:
        MmtpError: it is neither.
    """
    from mmtp.types import MmtpError

    width, cross, height = text.partition("x")
    if not width.isdigit() or not (height.isdigit() or not cross) or not int(height or width) * int(width):
        raise MmtpError(f"{option} {text}: write 64, or WIDTHxHEIGHT as in 96x64")
    return int(height or width), int(width)
