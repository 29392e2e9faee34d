import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp import hub
from mmtp.registry import REGISTRY
from mmtp.testing import ConformanceError, Golden, check_tokenizer, check_zoo_entry, tokenizer_golden, write_golden
from mmtp.testing.fakes import BlockTokenizer
from mmtp.types import Codes

CARD = """# block

Mean colours of blocks.

## Data

None.

## Licence

Apache-2.0

## Measured

| what | value | command |
|---|---|---|
| PSNR | 20 dB | `mmtp eval block` |

## Reproduce

    mmtp train recipe.toml
"""


class Broken(BlockTokenizer):
    """Keeps every promise but the one that ``fault`` names."""

    fault = ""

    def encode(self, media):
        codes = super().encode(media)
        ids, lengths = codes.ids, codes.lengths
        if self.fault == "batch":
            ids = (ids + len(media)) % self.config.levels
        elif self.fault == "order":
            ids[0] = (ids[0] + (len(media) > 1)) % self.config.levels
        elif self.fault == "random":
            ids = torch.randint(0, self.config.levels, ids.shape)
        elif self.fault == "range":
            ids = ids * 3
        elif self.fault == "type":
            ids = ids.int()
        elif self.fault == "padding":
            ids = torch.where(ids == 0, 1, ids)
        return Codes(ids, lengths, None if self.fault == "crop" else codes.sizes)

    def decode(self, codes):
        pictures = super().decode(codes)
        return [p * 2 + 0.1 for p in pictures] if self.fault == "values" else pictures

    def num_tokens(self, shape):
        return super().num_tokens(shape) + (self.fault == "count")

    def grid(self, shape):
        if self.fault == "network":
            self(torch.zeros(3, *shape))
        return super().grid(shape)

    def forward(self, x):
        return x

    @property
    def spec(self):
        spec = super().spec
        if self.fault == "fingerprint":
            object.__setattr__(spec, "fingerprint", "same")
        return spec


@pytest.fixture(autouse=True)
def _registered(block_registered):
    REGISTRY.register("tokenizer", "broken", f"{__name__}:Broken")


def pictures():
    return [torch.rand(3, 16, 16), torch.rand(3, 9, 21), torch.rand(3, 1, 1)]


def test_a_tokenizer_that_keeps_its_promises_passes():
    check_tokenizer(BlockTokenizer.Config().build(), pictures())


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=2, max_size=3), st.integers(1, 9), st.integers(2, 7))
def test_any_sizes_pass(sizes, block, levels):
    check_tokenizer(BlockTokenizer.Config(block=block, levels=levels).build(), [torch.rand(3, h, w) for h, w in sizes])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("batch", "depend on what else is in the batch"),
        ("order", "depend on"),
        ("random", "other codes when it is run again"),
        ("range", "its size is 5"),
        ("type", "not int64"),
        ("padding", "not 0 after its end"),
        ("crop", r"item 1 comes back as \[3, 16, 24\], it was \[3, 9, 21\]"),
        ("values", "outside"),
        ("count", "num_tokens says 13 for item 0, encode gives 12"),
        ("network", "without running the network"),
        ("fingerprint", "the fingerprint stays the same when gain changes"),
    ],
)
def test_every_broken_promise_is_found(fault, message, monkeypatch):
    monkeypatch.setattr(Broken, "fault", fault)
    monkeypatch.setattr(Broken.Config, "owner", classmethod(lambda cls: Broken))
    tokenizer = Broken(BlockTokenizer.Config())
    monkeypatch.setattr(BlockTokenizer.Config, "owner", classmethod(lambda cls: Broken))
    with pytest.raises(ConformanceError, match=message):
        check_tokenizer(tokenizer, pictures())


@pytest.fixture
def entry(tmp_path) -> Path:
    folder = tmp_path / "block"
    tokenizer = BlockTokenizer.Config().build()
    hub.save_pretrained(tokenizer, folder)
    (folder / "README.md").write_text(CARD)
    (folder / "recipe.toml").write_text('task = "tokenizer"\n[tokenizer]\ntype = "block"\n[run]\nsteps = 1\nbatch = 1\n')
    write_golden(folder / "golden.safetensors", Golden(tokenizer_golden(tokenizer, pictures()), tolerance=1e-5))
    return folder


def test_a_good_entry_passes(entry):
    check_zoo_entry(entry)


@pytest.mark.parametrize("name", ["README.md", "config.json", "golden.safetensors", "recipe.toml"])
def test_a_missing_file_is_named(entry, name):
    (entry / name).unlink()
    with pytest.raises(ConformanceError, match=f"has no {name}"):
        check_zoo_entry(entry)


def test_code_has_no_place_in_the_zoo(entry):
    (entry / "model.py").write_text("")
    with pytest.raises(ConformanceError, match=r"model\.py: the zoo holds data only"):
        check_zoo_entry(entry)


def test_files_have_a_greatest_size(entry):
    with (entry / "extra.bin").open("wb") as file:
        file.truncate(hub.MAX_SHARD_BYTES + 1)
    with pytest.raises(ConformanceError, match="larger than 15 MiB"):
        check_zoo_entry(entry)


def test_a_card_bears_the_name_of_its_entry(entry):
    other = entry.rename(entry.with_name("other"))
    with pytest.raises(ConformanceError, match="is titled 'block', not 'other'"):
        check_zoo_entry(other)


def test_a_recipe_with_an_unknown_key_is_refused(entry):
    with (entry / "recipe.toml").open("a") as file:
        file.write("stepss = 3\n")
    with pytest.raises(ValueError, match="unknown key 'stepss'; did you mean 'steps'"):
        check_zoo_entry(entry)


def test_other_weights_do_not_reproduce_the_golden_file(entry):
    hub.save_weights({"gain": torch.full((3,), 0.5)}, entry)
    with pytest.raises(ConformanceError, match="is not reproduced: .* codes differ"):
        check_zoo_entry(entry)


def test_a_copy_elsewhere_is_as_good(entry, tmp_path):
    check_zoo_entry(Path(shutil.copytree(entry, tmp_path / "elsewhere" / "block")))
