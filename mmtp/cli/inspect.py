"""``mmtp inspect``: what a shard, a data set or a saved folder holds."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mmtp.data.shards import Row
    from mmtp.stream.vocab import VocabLayout


def inspect(what: str, /, *, row: int = 0, tokenizer: list[str] | None = None) -> int:
    """Show what a data set, a shard, a tokenizer or a model holds.

    Args:
        what: a data set, a shard (*.arrow), a saved folder, or a zoo entry.
        row: the document that is shown token by token, counted from 0.
        tokenizer: where the words of a document are to be read, and the zoo does not know the text tokenizer; may be given
            several times.

    Examples:
        mmtp inspect tokens/easy-vqa
        mmtp inspect tokens/easy-vqa/shard-00000.arrow --row 7
        mmtp inspect image-fsq-f8
    """
    from mmtp.cli.tables import show

    path = Path(what)
    if path.suffix == ".arrow":
        show(*_shard(path, row, tokenizer or []))
    elif path.is_dir() and not (path / "config.json").is_file():
        show(*_dataset(path, row, tokenizer or []))
    else:
        show(*_saved(what))
    return 0


def _dataset(folder: Path, row: int, given: list[str]) -> "list[Any]":
    from mmtp.cli.tables import facts
    from mmtp.data.loader import ShardDataset

    dataset = ShardDataset(folder)
    manifest, totals = dataset.manifest, dataset.totals
    values = {
        "source": manifest.source,
        "inputs": f"{manifest.inputs:,} = {totals.ok:,} ok + {totals.quarantined:,} quarantined",
        **{f"  {reason}": f"{number:,}" for reason, number in totals.reasons.items()},
        "shards": f"{manifest.shards:,}, {totals.bytes:,} bytes",
        "fingerprint": dataset.fingerprint,
    }
    return [
        facts(str(folder), values),
        facts("configuration", manifest.config),
        *_streams(dataset, dataset.lengths, dataset.layout, row, given),
    ]


def _shard(path: Path, row: int, given: list[str]) -> "list[Any]":
    from mmtp.cli.tables import facts
    from mmtp.data.shards import Shard

    shard = Shard(path)
    lo, hi = shard.head.range
    values = {"inputs": f"{lo:,} to {hi - 1:,}, {len(shard.head.quarantine):,} quarantined", "bytes": f"{path.stat().st_size:,}"}
    return [
        facts(str(path), values),
        facts("configuration", shard.head.config),
        *_streams(shard, shard.lengths, shard.head.layout, row, given),
    ]


def _streams(rows: "Any", lengths: "Any", layout: "VocabLayout", row: int, given: list[str]) -> "list[Any]":
    from mmtp.data.restore import load_tokenizers
    from mmtp.types import MmtpError

    if not len(rows):
        return [_layout(layout), "no documents"]
    if not 0 <= row < len(rows):
        raise MmtpError(f"row {row}: there are documents 0 to {len(rows) - 1}")
    return [_layout(layout), _lengths(lengths), _stream(rows[row], layout, load_tokenizers(layout, given, needed=False))]


def _layout(layout: "VocabLayout") -> "Any":
    from mmtp.cli.tables import table

    out = table(f"vocabulary {layout.hash}: {layout.size:,} ids", "ids", "what", "tokenizer", "fingerprint")
    out.add_row("0 to 31", "specials", "", "")
    if layout.text:
        lo, hi = layout.text_range
        out.add_row(f"{lo} to {hi - 1}", "text", layout.text.name, layout.text.fingerprint)
    lo, hi = layout.dim_range
    out.add_row(f"{lo} to {hi - 1}", f"dims 1 to {layout.max_dim}", "", "")
    for entry in layout.media:
        for k in range(len(entry.codebook_sizes)):
            lo, hi = layout.code_range(entry.modality, k)
            out.add_row(f"{lo} to {hi - 1}", f"{entry.modality} codebook {k}", entry.name, entry.fingerprint)
        if entry.continuous:
            out.add_row("", f"{entry.modality} features", entry.name, entry.fingerprint)
    return out


def _lengths(lengths: "Any") -> "Any":
    import numpy as np

    from mmtp.cli.tables import facts

    quantiles = ", ".join(f"{q} %: {int(np.percentile(lengths, q))}" for q in (0, 25, 50, 75, 100))
    values = {
        "documents": f"{len(lengths):,}",
        "tokens": f"{int(lengths.sum()):,}",
        "per document": f"mean {lengths.mean():.1f}; {quantiles}",
    }
    return facts("documents", values)


def _stream(row: "Row", layout: "VocabLayout", tokenizers: "Mapping[str, Any]") -> "Any":
    """A stream run by run: neighbours of one kind share a line."""
    from rich.markup import escape

    from mmtp.cli.tables import table

    text = tokenizers.get(layout.text.name) if layout.text else None
    out = table(escape(f"{row.key}: {len(row.tokens)} tokens, {int(row.target_mask.sum())} of them targets"), "offset", "target", "what")
    lo, hi = layout.text_range
    offset = 0
    for run in _runs(row, layout):
        tokens, last = run, offset + len(run) - 1
        if lo <= tokens[0] < hi and text is not None:
            shown = f"{len(tokens)} x text: {text.decode_text([t - lo for t in tokens])!r}"
        elif len(tokens) == 1 or lo <= tokens[0] < hi:
            shown = ", ".join(map(layout.describe, tokens))
        else:
            shown = f"{len(tokens)} x {layout.describe(tokens[0])}, … {layout.describe(tokens[-1])}"
        place = str(offset) if last == offset else f"{offset}-{last}"
        out.add_row(place, "yes" if row.target_mask[offset] else "", escape(shown))
        offset += len(tokens)
    return out


def _runs(row: "Row", layout: "VocabLayout") -> "Sequence[list[int]]":
    from itertools import groupby

    def kind(place: int) -> "tuple[Any, ...]":
        token = int(row.tokens[place])
        lo, hi = layout.text_range
        single = token < lo or layout.dim_range[0] <= token < layout.dim_range[1]
        return bool(row.target_mask[place]), f"at {place}" if single else (lo <= token < hi)

    return [[int(row.tokens[place]) for place in places] for _, places in groupby(range(len(row.tokens)), kind)]


def _saved(name: str) -> "list[Any]":
    from mmtp.cli.tables import facts
    from mmtp.config import load_file
    from mmtp.hub import find, load_weights

    folder = find(name)
    data = load_file(folder / "config.json")
    files = {path.name: f"{path.stat().st_size:,} bytes" for path in sorted(folder.iterdir()) if path.is_file()}
    state = load_weights(folder) or {}
    modules: dict[str, int] = {}
    for key, tensor in state.items():
        modules[key.partition(".")[0]] = modules.get(key.partition(".")[0], 0) + tensor.numel()
    parameters = {"all": f"{sum(modules.values()):,}", **{f"  {key}": f"{number:,}" for key, number in modules.items()}}
    return [facts(str(folder), files), facts("configuration", _flat(data)), facts("parameters", parameters)]


def _flat(data: "Mapping[str, Any]", prefix: str = "") -> "dict[str, Any]":
    out: dict[str, Any] = {}
    for key, value in data.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
