"""From what a person types to a source."""

import glob
from pathlib import Path

from mmtp.data.errors import DataError
from mmtp.data.sources.base import SUFFIXES, Source
from mmtp.types import Modality

KINDS = "a folder, *.jsonl, *.tar, *.parquet, hf:OWNER/NAME[:SPLIT] or easy-vqa[:SPLIT]"


def open_source(spec: str | Path, modality: Modality = Modality.IMAGE) -> Source:
    """The source that a word stands for.

    Args:
        spec: a folder of media (or of .tar or .parquet files), a JSONL manifest, one .tar or .parquet file or a quoted pattern of
            them, ``hf:OWNER/NAME[:SPLIT]`` or ``easy-vqa[:SPLIT]``; the split is "train" where none is named.
        modality: which media are wanted of it.

    Raises:
        DataError: there is no such thing.
    """
    text = str(spec)
    head, _, split = text.partition(":")
    if head == "easy-vqa":
        from mmtp.data.sources.easy_vqa import EasyVqaSource

        if modality is not Modality.IMAGE:
            raise DataError(f"easy-vqa holds pictures, no {modality}")
        return EasyVqaSource(split or "train")
    if head == "hf":
        from mmtp.data.sources.tables import HubSource

        name, _, split = split.partition(":")
        return HubSource(name, split or "train", modality)
    path = Path(text)
    if path.is_file() and path.suffix == ".jsonl":
        from mmtp.data.sources.folder import ManifestSource

        return ManifestSource(path.absolute())
    if path.is_dir():
        return _folder(path.absolute(), modality)
    return _files([Path(p).absolute() for p in sorted(glob.glob(text))] or [path.absolute()], text, modality)


def _folder(path: Path, modality: Modality) -> Source:
    from mmtp.data.sources.folder import FolderSource

    for ending in (".tar", ".parquet"):
        if files := sorted(path.glob(f"*{ending}")):
            return _files(files, str(path), modality)
    source = FolderSource(path, modality)
    if not source.items():
        raise DataError(f"{path}: holds no {modality} files ({', '.join(sorted(SUFFIXES[modality]))})")
    return source


def _files(files: list[Path], text: str, modality: Modality) -> Source:
    if not files[0].exists():
        raise DataError(f"{text}: no such file or folder; a source is {KINDS}")
    roots, endings = {file.parent for file in files}, {file.suffix for file in files}
    names = tuple(file.name for file in files)
    if len(roots) == 1 and endings == {".tar"}:
        from mmtp.data.sources.webdataset import WebDatasetSource

        return WebDatasetSource(roots.pop(), names, modality)
    if len(roots) == 1 and endings == {".parquet"}:
        from mmtp.data.sources.tables import ParquetSource

        return ParquetSource(roots.pop(), names, modality)
    raise DataError(f"{text}: cannot be read as a source; a source is {KINDS}, all files in one folder")
