"""Checks every byte of a data set, and says what to do about each that is wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmtp.data.errors import DataError
from mmtp.data.manifest import MANIFEST, PLAN, QUARANTINE, Manifest, ShardRecord, Totals, quarantine_bytes, read_journals
from mmtp.data.plan import Plan
from mmtp.data.shards import Shard, check_hash
from mmtp.data.storage import digest

AGAIN = "run the same mmtp tokenize again"


@dataclass(frozen=True)
class Problem:
    """Something wrong.

    Attributes:
        file: where.
        what: what was found.
        advice: what to do.
    """

    file: Path
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}; {self.advice}"


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        files: files read.
        bytes: bytes read.
        totals: sums over the sound shards.
        problems: empty where all is well.
    """

    files: int
    bytes: int
    totals: Totals
    problems: tuple[Problem, ...]


def verify(folder: str | Path, progress: Callable[[int, int], None] | None = None) -> Verdict:
    """Reads everything that a data set consists of and compares it with the hashes noted when it was written.

    Args:
        folder: of the data set.
        progress: called with (shards checked, shards in all).

    Raises:
        DataError: the folder is no data set.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    problems: list[Problem] = []
    manifest = _manifest(folder, problems)
    records, damaged = read_journals(folder)
    if manifest is None and not records:
        raise DataError(f"{folder}: has neither {MANIFEST} nor a journal, so it is no data set of mmtp")
    for name, lines in damaged.items():
        problems.append(
            Problem(folder / name, f"line {', '.join(map(str, lines))} is torn or damaged", f"{AGAIN}; it makes those shards anew")
        )
    plan = _plan(folder, manifest, problems)
    sound: list[ShardRecord] = []
    for done, record in enumerate(records.values(), start=1):
        try:
            check_hash(folder / record.file, record.xxh3)
            _check_record(folder / record.file, record, plan)
            sound.append(record)
        except DataError as error:
            problems.append(_problem(folder / record.file, error))
        if progress is not None:
            progress(done, len(records))
    if manifest is not None:
        problems += _whole(folder, manifest, records, len(sound) == len(records))
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return Verdict(len(files), sum(path.stat().st_size for path in files), Totals.of(sound), tuple(problems))


def _manifest(folder: Path, problems: list[Problem]) -> Manifest | None:
    try:
        return Manifest.read(folder)
    except DataError as error:
        if (folder / MANIFEST).exists():
            problems.append(_problem(folder / MANIFEST, error))
        else:
            problems.append(Problem(folder / MANIFEST, "is missing", f"{AGAIN}; it is written anew"))
        return None


def _plan(folder: Path, manifest: Manifest | None, problems: list[Problem]) -> Plan | None:
    path = folder / PLAN
    try:
        if manifest is not None:
            check_hash(path, manifest.plan)
        return Plan.read(path)
    except DataError as error:
        problems.append(Problem(path, _reason(path, error).partition("; ")[0], f"{AGAIN}; it is written anew"))
        return None


def _check_record(path: Path, record: ShardRecord, plan: Plan | None) -> None:
    """The file is as it was written; here its contents are compared with what the journal and the plan say of it."""
    shard = Shard(path)
    lo, hi = shard.head.range
    inputs = record.ok + record.quarantined
    if plan is not None and plan.range(record.shard) != (lo, hi):
        raise DataError(f"{path}: holds inputs {lo} to {hi}, the plan says {plan.range(record.shard)}; delete it and {AGAIN}")
    if hi - lo != inputs or len(shard.head.quarantine) != record.quarantined:
        raise DataError(f"{path}: {hi - lo} inputs went in, {inputs} came out; delete it and {AGAIN}")
    if len(shard) != record.rows or int(shard.lengths.sum()) != record.tokens:
        raise DataError(f"{path}: has {len(shard)} rows, the journal says {record.rows}; delete it and {AGAIN}")


def _whole(folder: Path, manifest: Manifest, records: dict[int, ShardRecord], all_sound: bool) -> list[Problem]:
    problems = []
    if len(records) < manifest.shards:
        what = f"{len(records)} of {manifest.shards} shards are there"
        problems.append(Problem(folder, what, f"{AGAIN}; it goes on where it stopped"))
    elif not manifest.complete:
        problems.append(Problem(folder / MANIFEST, "says that the run has not ended", f"{AGAIN}; nothing is made anew"))
    elif manifest.totals != Totals.of(records.values()):
        problems.append(Problem(folder / MANIFEST, "has other sums than the journal", f"{AGAIN}; it is written anew"))
    if manifest.complete:
        path = folder / QUARANTINE
        found = path.read_bytes() if path.is_file() else b""
        if digest(found) != manifest.quarantine or (all_sound and found != quarantine_bytes(folder, records)):
            problems.append(Problem(path, "is not as it was written", f"{AGAIN}; it is written anew"))
    return problems


def _problem(path: Path, error: DataError) -> Problem:
    what, _, advice = _reason(path, error).rpartition("; ")
    return Problem(path, what, advice)


def _reason(path: Path, error: DataError) -> str:
    return str(error).removeprefix(f"{path}: ")
