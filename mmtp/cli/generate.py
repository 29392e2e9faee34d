"""``mmtp generate``: ask a model in words, pictures and sound; it answers in any of them."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mmtp.decode.batcher import Piece
    from mmtp.decode.stats import Generation
    from mmtp.events import TextReader

ROWS = 16
"""Variants that are written at a time; others follow as these end."""


def generate(
    model: str,
    prompt: str,
    /,
    *,
    image: list[Path] | None = None,
    audio: list[Path] | None = None,
    out: Path | None = None,
    n: int = 1,
    seed: int = 0,
    temperature: list[str] | None = None,
    top_k: list[str] | None = None,
    top_p: list[str] | None = None,
    min_p: list[str] | None = None,
    guidance: list[str] | None = None,
    repetition_penalty: float = 1.0,
    verification: Literal["coupling", "rejection"] = "coupling",
    max_new_tokens: int = 4352,
    size: str | None = None,
    tokenizer: list[str] | None = None,
    drafts: str = "auto",
    draft_cost: float | None = None,
    cache: Literal["bfloat16", "int8"] | None = None,
    compile: bool | None = None,
    device: str = "cpu",
    precision: Literal["float32", "bfloat16"] = "float32",
    plain: bool = False,
    exact: bool = False,
    report: bool = False,
    json_schema: str | None = None,
    regex: str | None = None,
) -> int:
    """Ask a model in words, pictures and sound; it answers in any of them.

    Words are printed as they come; pictures are written to --out, several as a grid; so is sound, several one after another.

    Settings of sampling may be given once for all media and once for each: --temperature 0.7 --temperature image=1.

    Args:
        model: a zoo entry, a folder or a Hub id.
        prompt: what the person says.
        image: a picture that the prompt speaks of; may be given several times.
        audio: a recording that the prompt speaks of; likewise.
        out: PNG file for drawn pictures, or WAV file for sound.
        n: number of variants; they take the seeds from SEED on.
        seed: equal seeds give equal output.
        temperature: 0 takes the most probable token every time; 1 without it.
        top_k: choose among so many of the most probable tokens; 0, as without it, among all.
        top_p: choose among the most probable tokens that make up this share.
        min_p: choose among tokens at least so many times as probable as the most probable one.
        guidance: scale of classifier-free guidance inside pictures; above 1 the words weigh more, 1 is off. FIRST:LAST goes from one
            to the other in equal steps over a picture.
        repetition_penalty: makes words that stand in the stream already less probable; 1 is off.
        verification: how drafts are judged: coupling gives the tokens of plain decoding, rejection others of the same distribution.
        max_new_tokens: limit of the answer.
        size: bring given pictures to WIDTHxHEIGHT, or to a square.
        tokenizer: a zoo entry, folder or Hub id, where the model was trained with one that the zoo does not know under its name; may be
            given several times.
        drafts: where drafts come from: head (the model's own), ngrams (of text, by the counts of mmtp ngrams), lookup (of text, from the
            stream itself), jacobi (of codes, from the pass before), refined (the same by the model's refiner, see mmtp refiner), or a
            smaller model over the same vocabulary, by its name; auto is ngrams for words, head where the model has none, and refined for
            codes, jacobi where it has none; head+jacobi goes on behind the head's.
        draft_cost: what one more draft costs, in passes of the model; without it that is reckoned from the model. As many are made as pay,
            with 0 all.
        cache: hold keys and values in bfloat16 or int8 instead of what the model computes in: half or a quarter of the memory, more time.
        compile: run the blocks of a pass in one call: on the CPU by kernels compiled for this machine, which is done without asking where
            there is a C++ compiler and the model allows it; on an accelerator by kernels that torch.compile has fused, recorded once per
            shape, where it is asked for.
        device: where the model runs: cpu, cuda, cuda:N.
        precision: of weights and what they multiply; in bfloat16 tokens come a little sooner, and may be others.
        plain: one token per pass, without drafts; the output is the same, with rejection its distribution.
        exact: run plain and speculative decoding on equal shapes, so that they agree bit for bit.
        report: print tokens per pass and the share of drafts accepted, by medium and offset.
        json_schema: the answer is JSON that this schema describes; a file that ends in .json, or the schema itself.
        regex: the answer is text that this regular expression matches as a whole.

    Examples:
        mmtp generate vqa-s "draw a blue circle" --out circle.png
        mmtp generate vqa-s "draw a red triangle" --n 9 --out triangles.png --report
        mmtp generate vqa-s "draw a blue circle" --temperature text=0 --guidance 1:4 --out circle.png
        mmtp generate vqa-s "what color is the shape?" --image circle.png --temperature 0
        mmtp generate vqa-s "what shape is it?" --image circle.png --regex "circle|triangle|rectangle"
        mmtp generate runs/mine/result "draw a red house" --tokenizer runs/my-tokenizer/result --out house.png
        mmtp generate runs/speech-s/result "say please enter your password" --out password.wav
    """
    from dataclasses import replace

    import torch

    from mmtp.cli import CHECK_FAILED
    from mmtp.cli.sampling import device_of, drafts_of, sampling_settings
    from mmtp.cli.tokenize import parse_size
    from mmtp.data.media import contact_sheet, encode_png, read_image, read_sound, write_wav
    from mmtp.decode.constrain import Form
    from mmtp.decode.sample import Sampling
    from mmtp.events import TextReader
    from mmtp.pipeline import Pipeline
    from mmtp.types import MmtpError, Modality

    if n < 1:
        raise MmtpError(f"--n {n}: at least 1 is wanted")
    if out is not None and out.suffix.lower() not in (".png", ".wav"):
        raise MmtpError(f"--out {out}: pictures are written as PNG and sound as WAV; give a name that ends in .png or .wav")
    given = sampling_settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, guidance=guidance)
    base = Sampling(repetition_penalty=repetition_penalty, verification=verification, **given)
    bounds = parse_size(size) if size is not None else None
    pictures = [read_image(path, size=bounds) for path in image or []]
    pipeline = Pipeline.from_pretrained(
        model, tokenizers=tokenizer, exact=exact, drafts=drafts_of(drafts), draft_cost=draft_cost, cache=cache, compile=compile,
        device=device_of(device), precision=precision,
    )  # fmt: skip
    rate = int(pipeline.tokenizer(Modality.AUDIO).spec.sample_rate or 0) if audio or (out and out.suffix.lower() == ".wav") else 0
    sounds = [read_sound(path, sample_rate=rate)[0] for path in audio or []]
    form = Form()
    if json_schema is not None:
        form["json_schema"] = Path(json_schema).read_text(encoding="utf-8") if json_schema.endswith(".json") else json_schema
    if regex is not None:
        form["regex"] = regex
    request = pipeline.request(prompt, pictures, sounds, sampling=base, max_new_tokens=max_new_tokens, **form)
    batcher = pipeline.engine.batcher(
        max_lanes=min(n, ROWS) * (1 + base.guided), context=len(request.prefix) + max(1, max_new_tokens), speculative=not plain
    )
    rows = [batcher.submit(replace(request, sampling=replace(base, seed=seed + i))) for i in range(n)]
    drawn, said = [], []
    for row in rows:
        _tell(batcher.stream(row), TextReader(pipeline.layout, pipeline.tokenizer(Modality.TEXT)))
        drawn += pipeline.drawn(row.generation)
        said += pipeline.sounds(row.tokens, row.prompt_length, as_one=True)
    replies = [row.generation for row in rows]
    for found, kind, suffix in ((drawn, "pictures", ".png"), (said, "sounds", ".wav")):
        if found and (out is None or out.suffix.lower() != suffix):
            print(f"{len(found)} {kind} came; give --out FILE{suffix} to keep them")
    if out is not None:
        wanted = drawn if out.suffix.lower() == ".png" else said
        if not wanted:
            raise MmtpError(f"{prompt!r}: the answer holds nothing for a {out.suffix} file, so {out} was not written")
        out.parent.mkdir(parents=True, exist_ok=True)
        if wanted is said:
            write_wav(out, torch.cat(said, dim=-1), rate)
        else:
            out.write_bytes(encode_png(contact_sheet(drawn) if len(drawn) > 1 else drawn[0]))
        print(out)
    if report:
        _report(replies)
    if form and (broken := [reply for reply in replies if reply.cut or reply.failure]):
        why = broken[0].failure or f"cut at {max_new_tokens} tokens; raise --max-new-tokens"
        print(f"mmtp: {len(broken)} of {n} answers lack the end of their form: {why}", file=sys.stderr)
        return CHECK_FAILED
    return 0


def _tell(pieces: "Iterable[Piece]", reader: "TextReader") -> None:
    """Prints a reply's words as they come, and a line break after them."""
    any_words = False
    for piece in pieces:
        if words := reader.push(piece.tokens, final=piece.generation is not None):
            print(words, end="", flush=True)
            any_words = True
    if any_words:
        print()


def _report(replies: "list[Generation]") -> None:
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    from mmtp.models.heads.base import offset_name

    drafted, accepted = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for reply in replies:
        drafted += reply.stats.drafted
        accepted += reply.stats.accepted
    tokens, passes = (sum(getattr(r.stats, name) for r in replies) for name in ("generated", "passes"))
    seconds = max(r.stats.seconds for r in replies)  # they run beside each other
    table = Table(title=f"{tokens} tokens in {passes} passes: {tokens / max(1, passes):.2f} per pass, {tokens / seconds:.0f} per second")
    for column in ("medium", "offset", "drafted", "accepted", "share"):
        table.add_column(column, justify="right" if column != "medium" else "left")
    for modality, offset in sorted(drafted):
        many, kept = drafted[modality, offset], accepted[modality, offset]
        table.add_row(modality, offset_name(offset), str(many), str(kept), f"{kept / many:.1%}")
    Console().print(table)
