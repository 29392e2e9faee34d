"""``mmtp zoo``: the trained tokenizers and models that come along."""

from pathlib import Path


def zoo(name: str | None = None, /, *, check: bool = False) -> int:
    """List the zoo, show the card of an entry, or check that entries still give what they gave when they were released.

    A check loads the entry, reads its card and recipe, and reproduces its golden file. Of a tokenizer with a network it tells as well
    what share of the golden file's codes would be others if the encoder ran in bfloat16.

    Args:
        name: an entry of the zoo, or a saved folder.
        check: check this entry, or all of them; the exit code is 1 if one fails.

    Examples:
        mmtp zoo
        mmtp zoo image-fsq-f8
        mmtp zoo --check
    """
    from rich.console import Console

    from mmtp.hub import find, iter_zoo

    folders = [find(name)] if name is not None else [folder for _, folder in iter_zoo()]
    if check:
        return max([_check(folder) for folder in folders], default=0)
    if name is not None:
        from rich.markdown import Markdown

        text = (folders[0] / "README.md").read_text(encoding="utf-8")
        if (console := Console()).is_terminal:
            console.print(Markdown(text))
        else:
            print(text, end="")
    else:
        _list(folders)
    return 0


def _list(folders: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    from mmtp.testing.card import read_card

    table = Table("name", "what", "parameters", "size", "measured", box=None, pad_edge=False)
    for folder in folders:
        card = read_card(folder / "README.md")
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
        table.add_row(folder.name, card.what, _count(num_parameters(folder)), f"{size:.1f} MiB", card.headline)
    # In a pipe there is no width to keep to: a table broken at 80 columns is of no use to grep.
    console = Console(width=None if Console().is_terminal else 10_000)
    console.print(table if folders else "The zoo is empty.")


def _check(folder: Path) -> int:
    from mmtp.testing.conformance import check_zoo_entry
    from mmtp.types import MmtpError

    try:
        check_zoo_entry(folder)
    except MmtpError as error:
        print(f"{folder.name}: failed: {error}")
        return 1
    print(f"{folder.name}: ok{_in_bfloat16(folder)}")
    return 0


def _in_bfloat16(folder: Path) -> str:
    """What half precision would do to the codes of a discrete tokenizer; empty where there is no network before the codes."""
    from mmtp.eval.precision import bfloat16_difference
    from mmtp.hub import from_pretrained
    from mmtp.testing.golden import golden_media, read_golden

    entry = from_pretrained(folder)
    if not (hasattr(entry, "encoder") and hasattr(entry, "quantizer")):
        return ""
    shares = bfloat16_difference(entry, golden_media(entry, read_golden(folder / "golden.safetensors")))
    return "; codes that bfloat16 changes: " + ", ".join(f"{share:.2%}" for share in shares)


def num_parameters(folder: Path) -> int:
    """Numbers in the weights of a saved folder, read from the files' headers alone."""
    import json
    import math

    total = 0
    for path in folder.glob("model*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    return total


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number) if number else "-"
