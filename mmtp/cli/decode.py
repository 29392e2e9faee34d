"""``mmtp decode``: shards of tokens back into pictures, videos, sound and text."""

from pathlib import Path
from typing import Literal


def decode(
    path: Path, /, *, out: Path, limit: int | None = None, tokenizer: list[str] | None = None, video: Literal["mp4", "gif"] = "mp4"
) -> int:
    """Turn token streams back into files: PNG, MP4, WAV and text, and a sheet of the pictures.

    Writes one picture, video or sound for each input, documents.txt with what is said in the documents, and contact-sheet.png.

    Args:
        path: a data set, or one shard of it (*.arrow).
        out: folder for the files.
        limit: only so many documents.
        tokenizer: a zoo entry, folder or Hub id, where the data were made with one that the zoo does not know under its name;
            may be given several times.
        video: what videos are written as; mp4 needs the extra mmtp[video].

    Examples:
        mmtp decode tokens/easy-vqa --out pictures/ --limit 100
        mmtp decode tokens/mine/shard-00003.arrow --out pictures/ --tokenizer runs/my-tokenizer
    """
    from mmtp.cli.tables import progress_bar
    from mmtp.data.export import export
    from mmtp.data.loader import open_rows

    rows, layout = open_rows(path)
    with progress_bar("decoding", "documents") as bar:
        written = export(rows, layout, out, tokenizers=tokenizer or (), limit=limit, video=video, progress=bar)
    print(f"{out}: {written.documents:,} documents, {written.pictures:,} pictures, {written.videos:,} videos, {written.sounds:,} sounds")
    return 0
