"""``mmtp ngrams``: counts of a model's texts, by which it drafts words."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def ngrams(model: Path, /, *, data: list[Path], order: int = 6) -> int:
    """Count which text follows which in data sets, and keep the counts in the folder of a model, which then drafts words by them.

    Decoding gives the same output, sooner where the texts are like those that it writes. Documents with the same text count once. The
    counts hold texts of the data in all but their order: leave out what must not be passed on with the model.

    Args:
        model: folder of a saved model.
        data: data sets of mmtp tokenize, mostly those that it was trained on; may be given several times.
        order: longest n-gram.

    Examples:
        mmtp ngrams runs/emoji/result --data runs/emoji-caption
        mmtp ngrams runs/omni/result --data runs/omni-caption --data runs/speech-whole
    """
    from mmtp.cli.tables import progress_bar
    from mmtp.data.loader import ShardDataset
    from mmtp.hub import read_config
    from mmtp.models.unified import NGRAMS_FILE, UnifiedModel
    from mmtp.stream.ngrams import NGrams
    from mmtp.types import MmtpError

    if not (model / "config.json").is_file():
        raise MmtpError(f"{model}: is no folder of a saved model, and counts are kept in one")
    config = read_config(model)
    if not isinstance(config, UnifiedModel.Config):
        raise MmtpError(f"{model}: is no model but a tokenizer, which drafts nothing")
    datasets = [ShardDataset(path).over(config.layout) for path in data]
    path = model / NGRAMS_FILE
    with progress_bar("counting", "documents") as bar:

        def documents() -> Iterator["np.ndarray"]:
            for done, row in enumerate(chain.from_iterable(datasets), 1):
                yield row.tokens
                bar(done, sum(map(len, datasets)))

        found = NGrams.count(documents(), config.layout, order)
    found.save(path)
    print(f"{path}: {len(found.keys):,} contexts, {len(found.counts):,} n-grams, {path.stat().st_size:,} bytes")
    return 0
