"""Texts that stand beside media, or inside installed modules: what text vocabularies are trained and measured on."""

import importlib
from collections.abc import Iterator
from pathlib import Path

from rich.progress import track

from mmtp.data.errors import DataError, DecodeError
from mmtp.data.labels import CAPTION, word
from mmtp.data.sources import Item, Source, open_source
from mmtp.types import Modality


def read_texts(spec: str, root: Path = Path(), template: str = CAPTION, *, progress: bool = False) -> Iterator[str]:
    """All texts of a source: captions or transcripts, tags, questions with their answers. Damaged labels are passed over.

    Args:
        spec: what :func:`~mmtp.data.sources.open_source` takes (paths start at ``root``), or ``python:MODULE`` for the paragraphs of
            the strings that stand in a module's tables (``python:pydoc_data.topics`` is Python's own manual).
        root: where relative paths start.
        template: how a caption is worded, with labels in braces.
        progress: whether to show a bar.

    Raises:
        DataError: there is no such source or module, or it holds neither pictures nor sounds with labels.
    """
    head, _, name = spec.partition(":")
    if head == "python":
        yield from _paragraphs(name)
        return
    source, items = _open(spec if head in ("easy-vqa", "hf") else str(root / spec))
    for item in track(items, f"reading {spec}", disable=not progress, transient=True):
        try:
            labels = source.read(item).labels
            caption = word(template, labels)
        except DecodeError:
            continue
        if caption:
            yield caption
        if tags := labels.get("tags"):
            yield ", ".join(tags)
        for question, answer in labels.get("questions", []):
            yield f"{question} {answer}"


def _open(spec: str) -> tuple[Source, list[Item]]:
    """The source as whichever medium it holds: texts do not care."""
    for modality in (Modality.IMAGE, Modality.AUDIO):
        source = open_source(spec, modality)
        items = source.items()
        try:
            if items:
                source.read(items[0])
                return source, items
        except DecodeError:
            continue
    raise DataError(f"{spec}: holds neither pictures nor sounds, whose labels are wanted")


def _paragraphs(name: str) -> Iterator[str]:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"python:{name}: no such module is installed") from error
    for attribute, table in sorted(vars(module).items()):
        if isinstance(table, dict) and not attribute.startswith("_"):
            for value in table.values():
                if isinstance(value, str):
                    yield from (paragraph for paragraph in value.split("\n\n") if paragraph.strip())
