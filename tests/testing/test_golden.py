import pytest
import torch

from mmtp.models.presets import preset
from mmtp.stream.vocab import MediaEntry, Special, TextEntry, VocabLayout
from mmtp.testing.fakes import BlockTokenizer
from mmtp.testing.golden import (
    Golden,
    GoldenError,
    check_model_golden,
    check_tokenizer_golden,
    model_golden,
    read_golden,
    tokenizer_golden,
    write_golden,
)
from mmtp.tokenizers.continuous.vit import TimmViT
from mmtp.types import Codes, Modality


@pytest.fixture
def tokenizer(block_registered):
    return BlockTokenizer.Config(block=2).build()


@pytest.fixture
def golden(tokenizer):
    return Golden(tokenizer_golden(tokenizer, [torch.rand(3, 64, 64), torch.rand(3, 9, 5)]), 1e-6, {"torch": "x"})


def test_what_is_written_is_read(tmp_path, golden):
    write_golden(tmp_path / "golden.safetensors", golden)
    read = read_golden(tmp_path / "golden.safetensors")
    assert read.tensors.keys() == golden.tensors.keys()
    assert all(torch.equal(read.tensors[k], v) for k, v in golden.tensors.items())
    assert (read.tolerance, read.notes) == (1e-6, {"torch": "x"})
    assert [p.name for p in tmp_path.iterdir()] == ["golden.safetensors"]


def test_it_is_reproduced(tokenizer, golden):
    check_tokenizer_golden(tokenizer, golden)


def test_latents_are_reproduced_within_the_tolerance():
    options = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 16}
    tokenizer = TimmViT.Config(model="vit_tiny_patch16_224", options=options).build().eval()
    golden = Golden(tokenizer_golden(tokenizer, [torch.rand(3, 16, 16), torch.rand(3, 9, 20)]), 1e-5)
    check_tokenizer_golden(tokenizer, golden)
    off = golden.tensors["values"] + 0.01
    with pytest.raises(GoldenError, match=r"values: off by 0\.01, 1e-05 is allowed"):
        check_tokenizer_golden(tokenizer, Golden(golden.tensors | {"values": off}, 1e-5))


def test_a_few_codes_on_a_border_may_differ(tokenizer, golden):
    codes = golden.tensors["codes"]
    few, many = codes.clone(), codes.clone()
    few[0, 0, 0, 0] = (few[0, 0, 0, 0] + 1) % 5
    many[0, 0] = (many[0, 0] + 1) % 5
    back = tokenizer.decode(Codes(few, golden.tensors["lengths"], golden.tensors["sizes"]))
    outputs = {f"output.{i}": picture for i, picture in enumerate(back)}
    check_tokenizer_golden(tokenizer, Golden(golden.tensors | outputs | {"codes": few}, 1e-6))
    with pytest.raises(GoldenError, match="1024 of 3117 codes differ"):
        check_tokenizer_golden(tokenizer, Golden(golden.tensors | {"codes": many}, 1e-6))


def test_a_reconstruction_beyond_the_tolerance_is_named(tokenizer, golden):
    off = golden.tensors["output.1"] + 0.01
    with pytest.raises(GoldenError, match=r"output\.1: off by 0\.01, 1e-06 is allowed"):
        check_tokenizer_golden(tokenizer, Golden(golden.tensors | {"output.1": off}, 1e-6))
    check_tokenizer_golden(tokenizer, Golden(golden.tensors | {"output.1": off}, 0.02))


def test_not_a_number_is_never_within_the_tolerance(tokenizer, golden):
    off = golden.tensors["output.0"] * float("nan")
    with pytest.raises(GoldenError, match="off by nan"):
        check_tokenizer_golden(tokenizer, Golden(golden.tensors | {"output.0": off}, 1e9))


def test_other_grids_are_named(tokenizer, golden):
    with pytest.raises(GoldenError, match="grids differ"):
        check_tokenizer_golden(BlockTokenizer.Config(block=4).build(), golden)


@pytest.mark.parametrize("content", [None, b"", b"not a safetensors file"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "golden.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GoldenError, match=r"golden\.safetensors: cannot be read"):
        read_golden(path)


def test_a_file_without_tolerance_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"codes": torch.zeros(1)}, tmp_path / "golden.safetensors")
    with pytest.raises(GoldenError, match="metadata must hold 'tolerance'"):
        read_golden(tmp_path / "golden.safetensors")


def test_a_models_golden_file_holds_the_log_probability_of_every_offset():
    layout = VocabLayout(
        text=TextEntry(name="t", size=20, fingerprint="t"),
        media=(MediaEntry(modality=Modality.IMAGE, name="i", fingerprint="i", codebook_sizes=(11,)),),
    )
    model = preset("tiny", layout).build().eval()
    code = layout.code_range(Modality.IMAGE)[0]
    low = layout.text_range[0]
    stream = [Special.BOS, low, low + 3, Special.BOI, layout.dim(1), layout.dim(2), code + 4, code + 10, Special.EOI, Special.EOS]
    tokens = torch.tensor(stream)
    golden = Golden(model_golden(model, tokens), 1e-6)
    logprobs = golden.tensors["logprobs"]
    assert logprobs.shape == (3, 10)
    for k in range(3):
        assert (logprobs[k, : 9 - k] < 0).all()
        assert (logprobs[k, 9 - k :] == 0).all()
    check_model_golden(model, golden)
    with torch.no_grad():
        model.embedding.table.weight[code + 10] += 0.1
    with pytest.raises(GoldenError, match=r"logprobs\[0\]: off by"):
        check_model_golden(model, golden)
