import pytest
import torch

from mmtp import cli, hub
from mmtp.cli.zoo import num_parameters
from mmtp.testing import Golden, tokenizer_golden, write_golden
from mmtp.testing.fakes import BlockTokenizer

CARD = """# block-8

Mean colours of blocks.

## Data
None.
## Licence
Apache-2.0
## Measured
| what | value | command |
|---|---|---|
| PSNR | 20 dB | `mmtp eval block-8` |
## Reproduce
    mmtp train recipe.toml
"""


@pytest.fixture
def zoo(tmp_path, monkeypatch, block_registered):
    monkeypatch.setattr(hub, "zoo_root", lambda family: tmp_path / hub.ZOO_FOLDERS[family])
    folder = tmp_path / "tokenizers" / "block-8"
    tokenizer = BlockTokenizer.Config().build()
    hub.save_pretrained(tokenizer, folder)
    (folder / "README.md").write_text(CARD)
    (folder / "recipe.toml").write_text('task = "tokenizer"\n[run]\nsteps = 1\nbatch = 1\n')
    write_golden(folder / "golden.safetensors", Golden(tokenizer_golden(tokenizer, [torch.rand(3, 16, 16)]), tolerance=1e-5))
    return folder


def test_the_list_says_what_there_is(zoo, capsys):
    assert cli.run(["zoo"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "what", "parameters", "size", "measured"]
    assert [cell.strip() for cell in row.split("  ") if cell.strip()] == [
        "block-8",
        "Mean colours of blocks.",
        "3",
        "0.0 MiB",
        "PSNR: 20 dB",
    ]


def test_a_name_shows_the_card(zoo, capsys):
    assert cli.run(["zoo", "block-8"]) == 0
    assert capsys.readouterr().out == CARD


def test_a_check_that_passes(zoo, capsys):
    assert cli.run(["zoo", "--check"]) == 0
    assert capsys.readouterr().out == "block-8: ok\n"


def test_a_check_that_fails_has_code_1_and_says_why(zoo, capsys):
    hub.save_weights({"gain": torch.zeros(3)}, zoo)
    assert cli.run(["zoo", "block-8", "--check"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("block-8: failed: ")
    assert "codes differ" in out


def test_parameters_are_counted_without_loading(zoo, monkeypatch):
    hub.save_weights({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, zoo)
    assert num_parameters(zoo) == 10
