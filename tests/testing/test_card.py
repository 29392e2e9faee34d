import pytest

from mmtp.testing.card import CardError, read_card, table_rows

CARD = """---
license: apache-2.0
---
# name

![picture](a.png)

What it is,
in a sentence. And another.

More.

## Data
d
## Licence
l
## Measured

| what | value | command |
|---|---:|---|
| PSNR | 31 dB | `x` |
| usage | 90 % | `y` |

| other | table |
|---|---|
| 1 | 2 |

## Reproduce

    mmtp train recipe.toml
"""


def test_a_card_is_read(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(CARD)
    card = read_card(path)
    assert (card.name, card.what) == ("name", "What it is, in a sentence.")
    assert card.measured == (("PSNR", "31 dB", "`x`"), ("usage", "90 %", "`y`"))
    assert card.headline == "PSNR: 31 dB"


def test_a_headline_names_the_columns_of_a_wider_table(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(CARD.replace("| what | value | command |", "| texts | bytes per token | command |"))
    assert read_card(path).headline == "PSNR: bytes per token 31 dB"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# name", "name", "has no title"),
        ("What it is,\nin a sentence. And another.\n\nMore.\n", "", "says nothing under its title"),
        ("## Licence\nl", "", "has no section '## Licence'"),
        ("## Data\nd\n", "## Data\n", "has no section '## Data'"),
        ("| PSNR | 31 dB | `x` |\n| usage | 90 % | `y` |\n", "", "holds no table of figures"),
        ("mmtp train", "see", "holds no mmtp command"),
    ],
)
def test_what_a_card_lacks_is_named(tmp_path, old, new, message):
    path = tmp_path / "README.md"
    path.write_text(CARD.replace(old, new))
    with pytest.raises(CardError, match=message):
        read_card(path)


def test_only_the_first_table_counts():
    assert table_rows("text\n| a |\n|---|\n| 1 |\n\n| b |\n|---|\n| 2 |\n") == [("a",), ("1",)]
    assert table_rows("no table") == []
