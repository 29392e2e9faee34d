"""``dataset.json``: what a folder of shards was made from and with, and what came out."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmtp.data.errors import DataError
from mmtp.data.plan import Plan
from mmtp.data.shards import Shard
from mmtp.data.storage import Journal, digest, readable_json, write_durable
from mmtp.stream.vocab import VocabLayout

MANIFEST, PLAN, QUARANTINE, JOURNALS = "dataset.json", "plan.arrow", "quarantine.jsonl", "journal*.jsonl"


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, as the journal notes it.

    Attributes:
        shard: its number in the plan.
        xxh3: hash of the file.
        bytes: size of the file.
        ok: inputs that gave documents.
        reasons: inputs that did not, by reason code.
        rows: documents.
        tokens: tokens of all documents.
    """

    shard: int
    xxh3: str
    bytes: int
    ok: int
    rows: int
    tokens: int
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return shard_name(self.shard)

    @property
    def quarantined(self) -> int:
        return sum(self.reasons.values())


@dataclass(frozen=True)
class Totals:
    """Sums over shards."""

    ok: int = 0
    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[ShardRecord]) -> "Totals":
        records = list(records)
        reasons = sum((Counter(r.reasons) for r in records), Counter())
        sums = {name: sum(getattr(r, name) for r in records) for name in ("ok", "rows", "tokens", "bytes")}
        return cls(**sums, reasons=dict(sorted(reasons.items())))

    @property
    def quarantined(self) -> int:
        return sum(self.reasons.values())


@dataclass(frozen=True)
class Manifest:
    """The contents of dataset.json.

    Attributes:
        source: name of the source.
        inputs: inputs in the plan.
        shards: shards in the plan.
        plan: hash of plan.arrow.
        config: how inputs become documents.
        tokenizers: name -> fingerprint.
        layout: the vocabulary.
        complete: whether every shard is written.
        totals: sums over all shards, once it is complete.
        quarantine: hash of quarantine.jsonl, once it is complete.
    """

    source: str
    inputs: int
    shards: int
    plan: str
    config: Mapping[str, Any]
    tokenizers: Mapping[str, str]
    layout: VocabLayout
    complete: bool = False
    totals: Totals = field(default_factory=Totals)
    quarantine: str = ""

    @classmethod
    def of(cls, plan: Plan, config: Mapping[str, Any], tokenizers: Mapping[str, str], layout: VocabLayout) -> "Manifest":
        return cls(plan.source, len(plan), plan.num_shards, plan.hash, json.loads(json.dumps(config)), dict(tokenizers), layout)

    def to_bytes(self) -> bytes:
        """JSON that ends with a hash of itself."""
        values = {k: v for k, v in vars(self).items() if k not in ("layout", "totals")}
        values |= {"layout": self.layout.to_dict(), "totals": asdict(self.totals)}
        values["xxh3"] = digest(json.dumps(values, sort_keys=True).encode())
        return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads what ``to_bytes`` wrote, and accepts nothing else.

        Raises:
            DataError: there is none, or it is damaged.
        """
        path = folder / MANIFEST
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise DataError(f"{folder}: has no {MANIFEST}, so it is no data set of mmtp") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        try:
            values = json.loads(data)
            del values["xxh3"]
            layout = VocabLayout.from_dict(values.pop("layout"), f"{path}: layout")
            manifest = cls(layout=layout, totals=Totals(**values.pop("totals")), **values)
            sound = manifest.to_bytes() == data
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path) from error
        if not sound:
            raise _damaged(path)
        return manifest

    def write(self, folder: Path) -> None:
        write_durable(folder / MANIFEST, self.to_bytes())

    def check_same(self, new: "Manifest", folder: Path, plan: Plan) -> None:
        """Refuses to go on with another configuration, other tokenizers or another plan.

        Args:
            new: of the run that wants to go on.
            folder: where.
            plan: of that run.

        Raises:
            DataError: names what differs, and both values.
        """
        for name in {**self.tokenizers, **new.tokenizers}:
            old_print, new_print = self.tokenizers.get(name, "absent"), new.tokenizers.get(name, "absent")
            if old_print != new_print:
                raise _refused(folder, f"tokenizer {name!r} had the fingerprint {old_print}, now {new_print}")
        for name in {**self.config, **new.config}:
            if self.config.get(name) != new.config.get(name):
                raise _refused(folder, f"{name} was {self.config.get(name)}, now {new.config.get(name)}")
        if self.layout != new.layout:
            raise _refused(folder, f"the vocabulary had the hash {self.layout.hash}, now {new.layout.hash}")
        if self.plan != new.plan:
            try:
                difference = Plan.read(folder / PLAN).difference(plan)
            except DataError:
                difference = "the inputs are others"
            raise _refused(folder, difference)

    def finished(self, records: Iterable[ShardRecord], quarantine: bytes) -> "Manifest":
        """The manifest of the complete data set."""
        totals = Totals.of(records)
        assert totals.ok + totals.quarantined == self.inputs, "an input was lost"
        return replace(self, complete=True, totals=totals, quarantine=digest(quarantine))


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:05d}.arrow"


def read_journals(folder: Path) -> tuple[dict[int, ShardRecord], dict[str, list[int]]]:
    """Finished shards by number, in order, and per journal the lines that are damaged.

    Shards are pure functions of their inputs, so two records of one shard differ in nothing.
    """
    records: dict[int, ShardRecord] = {}
    bad: dict[str, list[int]] = {}
    for path in sorted(folder.glob(JOURNALS)):
        entries, damaged = Journal(path).read()
        records |= {entry["shard"]: ShardRecord(**entry) for entry in entries}
        if damaged:
            bad[path.name] = damaged
    return dict(sorted(records.items())), bad


def quarantine_bytes(folder: Path, records: Mapping[int, ShardRecord]) -> bytes:
    """quarantine.jsonl: one object for each input that could not be used, in the order of the plan. The shards hold the same."""
    lines = []
    for record in records.values():
        if record.quarantined:
            lines += [readable_json(q.to_dict()) + "\n" for q in Shard(folder / record.file).head.quarantine]
    return "".join(lines).encode()


def _damaged(path: Path) -> DataError:
    return DataError(f"{path}: is damaged; delete it and run the same mmtp tokenize again: shards are kept")


def _refused(folder: Path, difference: str) -> DataError:
    return DataError(f"{folder}: was begun otherwise, and is not mixed: {difference}; choose another --out, or go back to what it was")
