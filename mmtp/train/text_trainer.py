"""Training of text vocabularies: byte-level BPE on the texts that sources bring."""

from dataclasses import dataclass
from pathlib import Path

from mmtp.config import Config, ConfigError, from_dict
from mmtp.data.texts import read_texts
from mmtp.hub import save_pretrained
from mmtp.tokenizers.text import TextTokenizer
from mmtp.train.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class TextSource(Config):
    """Where texts come from.

    Attributes:
        source: ``easy-vqa:train``, a tar, a folder (paths start at the data root), or ``python:MODULE`` for an installed module's own text.
        template: how a caption is worded; ``{caption}`` stands for it.
    """

    source: str
    template: str = "{caption}"


@dataclass(frozen=True, kw_only=True)
class TextData(Config):
    """``[data]`` of a text recipe. Every text counts once, however often it occurs."""

    sources: tuple[TextSource, ...]


@dataclass(frozen=True, kw_only=True)
class TextConfig(Config):
    """``[tokenizer]`` of a text recipe: entries of the vocabulary, the 256 bytes among them."""

    size: int = 4096

    def __post_init__(self) -> None:
        if self.size < 256:
            raise ValueError(f"size {self.size}: the 256 bytes need room")


def train_text(recipe: Recipe, folder: Path, *, data_root: Path, progress: bool = True) -> Path:
    """Trains a byte-level BPE and saves it in ``folder/result``.

    Args:
        recipe: ``[tokenizer]`` is a :class:`TextConfig` with ``type = "text"``, ``[data]`` a :class:`TextData`.
        folder: the run's folder.
        data_root: where relative paths of the sources start.
        progress: whether to show bars.
    """
    config = TextConfig.from_dict(recipe.tokenizer, "tokenizer")
    data = from_dict(TextData, recipe.data, "data")
    texts: dict[str, None] = {}  # a set that keeps order
    for source in data.sources:
        texts |= dict.fromkeys(read_texts(source.source, data_root, source.template, progress=progress))
    tokenizer = TextTokenizer.train(texts, config.size)
    if (given := tokenizer.spec.codebook_sizes[0]) < config.size:
        raise ConfigError(f"tokenizer.size: the texts give {given} entries, not {config.size}; lower it or add sources")
    return save_pretrained(tokenizer, folder / "result")
