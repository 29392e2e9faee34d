"""The tokenizing job: source -> decode -> batches by shape -> encode -> template -> shards, continued where it stopped.

A shard is a pure function of (its range of inputs, the tokenizers' fingerprints, the configuration). So it does not matter who
makes it, how often, or what was killed in between.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmtp import hub
from mmtp.data.encode import ShardMaker, TokenizeConfig, WritesText
from mmtp.data.engines.local import LocalEngine
from mmtp.data.errors import DataError
from mmtp.data.manifest import JOURNALS, MANIFEST, PLAN, QUARANTINE, Manifest, ShardRecord, Totals, quarantine_bytes, read_journals
from mmtp.data.plan import Plan
from mmtp.data.shards import Shard
from mmtp.data.sources import Source, open_source
from mmtp.data.storage import Journal, Share, locked, write_durable
from mmtp.stream.vocab import VocabLayout
from mmtp.tokenizers.base import DiscreteTokenizer
from mmtp.types import Modality

Progress = Callable[[int, int, Totals], None]
"""Called with inputs done (in earlier runs as well), inputs in all, and the sums so far."""


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        folder: of the data set.
        complete: whether all shards are there now (with several writers, the last one completes).
        totals: sums over all shards so far.
        made: shards made by this run.
        kept: shards that were there before.
        seconds: wall time.
    """

    folder: Path
    complete: bool
    totals: Totals
    made: int
    kept: int
    seconds: float


@dataclass(frozen=True)
class TokenizeWork:
    """What a worker process needs; tokenizers by name are loaded there, others travel along."""

    folder: Path
    source: Source
    tokenizer: Any
    text: Any
    layout: VocabLayout
    fingerprints: dict[str, str]
    config: TokenizeConfig
    writer: str

    def open(self) -> ShardMaker:
        tokenizer, text = _load(self.tokenizer), _load(self.text)
        return ShardMaker(self.folder, self.source, tokenizer, text, self.layout, self.fingerprints, self.config, self.writer)


def tokenize(
    source: str | Path | Source,
    out: str | Path,
    *,
    tokenizer: str | Path | DiscreteTokenizer,
    text: str | Path | WritesText | None = None,
    config: TokenizeConfig | None = None,
    workers: int | None = 1,
    share: Share | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Makes a data set of token streams, or goes on with one that was begun.

    What cannot be used goes to quarantine with a reason code: inputs = ok + quarantined. Running again continues; with other
    inputs, tokenizers or configuration it is refused.

    Args:
        source: what :func:`~mmtp.data.sources.open_source` reads, or a source of your own (picklable).
        out: folder of the data set.
        tokenizer: of the medium: a zoo entry, a folder or an object. A name is what the vocabulary calls it; objects are called by
            their class.
        text: the text tokenizer; needed by tasks that write words.
        config: how inputs become documents.
        workers: processes; see :class:`~mmtp.data.engines.local.LocalEngine`.
        share: which part of the shards to make, where a batch scheduler runs several writers on one folder.
        progress: called after every shard.

    Raises:
        DataError: the run cannot go on: one line says why and what to do. Finished shards are kept.
    """
    began = time.monotonic()
    folder, config, share = Path(out), config or TokenizeConfig(), share or Share()
    if config.needs_text and text is None:
        raise DataError(f"tasks {', '.join(config.tasks)} write words: name a text tokenizer (--text text-bpe-4k)")
    loaded = {_name(t): _load(t) for t in (text, tokenizer) if t is not None}
    layout = VocabLayout.of(loaded, max_dim=config.max_dim, written=config.draws, codebooks={_name(tokenizer): config.codebooks})
    fingerprints = {name: each.spec.fingerprint for name, each in loaded.items()}
    modality = loaded[_name(tokenizer)].spec.modality
    if modality is Modality.TEXT:
        raise DataError(f"{_name(tokenizer)}: is a text tokenizer; give it as --text, and one of pictures, videos or sound as --tokenizer")
    if isinstance(source, str | Path):
        source = open_source(source, modality)
    _make_folder(folder)
    with locked(folder, share):
        plan = Plan.of(source, config.shard_inputs)
        manifest = _begin(folder, Manifest.of(plan, config.to_dict(), fingerprints, layout), plan, share)
        journal = Journal(folder / f"journal{share.suffix}.jsonl")
        for path in [journal.path] if share.count > 1 else folder.glob(JOURNALS):
            Journal(path).repair()
        records = {n: r for n, r in read_journals(folder)[0].items() if _is_there(folder, r)}
        kept = len(records)
        units = [n for n in range(share.index, plan.num_shards, share.count) if n not in records]
        work = TokenizeWork(folder, source, tokenizer, text, layout, fingerprints, config, share.suffix)
        report = _reporter(records, plan, progress)
        report()
        for record in LocalEngine[ShardRecord](workers).run(work, units):
            journal.append(asdict(record))
            records[record.shard] = record
            report()
        records = {n: r for n, r in read_journals(folder)[0].items() if _is_there(folder, r)}
        complete = len(records) == plan.num_shards
        if complete:
            quarantine = quarantine_bytes(folder, records)
            write_durable(folder / QUARANTINE, quarantine, share.suffix)
            write_durable(folder / MANIFEST, manifest.finished(records.values(), quarantine).to_bytes(), share.suffix)
    totals = Totals.of(records.values())
    if complete and not totals.ok:
        reasons = ", ".join(f"{reason} {count}" for reason, count in totals.reasons.items())
        raise DataError(f"{source.name}: none of its {len(plan)} inputs can be used ({reasons}); {folder / QUARANTINE} names them")
    return Outcome(folder, complete, totals, len(units), kept, time.monotonic() - began)


def _begin(folder: Path, new: Manifest, plan: Plan, share: Share) -> Manifest:
    """Writes plan and manifest, or finds that those of an earlier run are the same."""
    if (folder / MANIFEST).exists():
        Manifest.read(folder).check_same(new, folder, plan)
    else:
        for record in read_journals(folder)[0].values():
            if _is_there(folder, record):
                # The manifest is lost, but shards know what they were made with.
                head = Shard(folder / record.file).head
                old = Manifest(new.source, new.inputs, new.shards, new.plan, head.config, head.tokenizers, head.layout)
                old.check_same(new, folder, plan)
                break
        write_durable(folder / PLAN, plan.to_bytes(), share.suffix)
        write_durable(folder / MANIFEST, new.to_bytes(), share.suffix)
    try:
        sound = Plan.read(folder / PLAN).hash == new.plan
    except DataError:
        sound = False
    if not sound:
        write_durable(folder / PLAN, plan.to_bytes(), share.suffix)
    return new


def _is_there(folder: Path, record: ShardRecord) -> bool:
    """Whether a journalled shard stands in the folder at full length; its bytes are the business of ``verify``."""
    path = folder / record.file
    return path.is_file() and path.stat().st_size == record.bytes


def _reporter(records: dict[int, ShardRecord], plan: Plan, progress: Progress | None) -> Callable[[], None]:
    def report() -> None:
        if progress is not None:
            totals = Totals.of(records.values())
            progress(totals.ok + totals.quarantined, len(plan), totals)

    return report


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from error


def _name(tokenizer: Any) -> str:
    if not isinstance(tokenizer, str | Path):
        return type(tokenizer).__name__
    return str(tokenizer) if hub.is_language_model(tokenizer) else Path(tokenizer).name


def _load(tokenizer: Any) -> Any:
    return hub.from_pretrained(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
