import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtp.hub import from_pretrained, save_pretrained
from mmtp.tokenizers.pretrained import Dac, DiffusersVQ, Encodec, Mimi, PretrainedError
from tests.tokenizers.pretrained.common import SETTINGS, adapter, media, theirs, tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def encoded(built, batch):
    out = built.encode(batch)
    return out.values if built.spec.latent_dim else out.ids


@pytest.mark.parametrize("name", SETTINGS)
def test_what_their_library_saved_is_loaded(name, tmp_path):
    theirs(name).save_pretrained(tmp_path)
    built, batch = adapter(name).from_pretrained_model(tmp_path), media(name)
    assert not built.training
    assert torch.equal(encoded(built, batch), encoded(tokenizer(name), batch))
    assert built.spec == tokenizer(name).spec
    assert built.spec.fingerprint != tokenizer(name, seed=1).spec.fingerprint


def test_fields_and_subfolder_are_passed_on(tmp_path):
    theirs("mimi").save_pretrained(tmp_path / "codec")
    assert Mimi.from_pretrained_model(tmp_path, subfolder="codec", num_codebooks=2).spec.num_codebooks == 2


def test_half_precision_models_run_in_float32(tmp_path):
    theirs("mimi").half().save_pretrained(tmp_path)
    built = Mimi.from_pretrained_model(tmp_path)
    assert {t.dtype for t in built.state_dict().values() if t.is_floating_point()} == {torch.float32}
    saved = from_pretrained(save_pretrained(built, tmp_path / "ours"))
    assert torch.equal(saved.encode(media("mimi")).ids, built.encode(media("mimi")).ids)


def test_configuration_holds_no_names_or_versions(tmp_path):
    model = theirs("dac")
    model.save_pretrained(tmp_path)
    for built in (Dac.wrap(model), Dac.from_pretrained_model(tmp_path)):
        assert not {"transformers_version", "_name_or_path", "architectures", "dtype"} & set(built.config.model)
    assert not [key for key in tokenizer("diffusers-vq").config.model if key.startswith("_")]


def test_missing_weights_are_an_error_not_random(tmp_path):
    theirs("encodec").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = sorted(state)[3]
    save_file({k: v for k, v in state.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(PretrainedError, match=f"is not a saved EncodecModel: 1 weights are missing, such as {lost}"):
        Encodec.from_pretrained_model(tmp_path)


def test_a_folder_of_another_model_is_refused(tmp_path):
    theirs("dac").save_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match="EncodecModel"):
        Encodec.from_pretrained_model(tmp_path)
    with pytest.raises(PretrainedError, match=r"Encodec wraps transformers.EncodecModel, not DacModel"):
        Encodec.wrap(theirs("dac"))


@pytest.mark.parametrize("cls", [Encodec, DiffusersVQ])
def test_a_folder_that_is_not_there_is_one_line(cls, tmp_path):
    with pytest.raises(PretrainedError, match=f"nothing: cannot be loaded as {cls.model_class}") as caught:
        cls.from_pretrained_model(tmp_path / "nothing")
    assert "\n" not in str(caught.value)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(PretrainedError, match=r"DiffusersVQ needs diffusers, which is an extra: pip install 'mmtp\[hf\]'"):
        DiffusersVQ.Config(model={}).build()


def test_libraries_are_imported_only_when_a_model_is_built():
    code = "import sys, mmtp.tokenizers.pretrained; print(sorted({'transformers', 'diffusers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


BAD = {
    "channels": lambda m: torch.cat([m, m]),
    "axes": lambda m: m[0],
    "empty": lambda m: m[..., :0],
    "integers": lambda m: m.to(torch.int64),
    "nan": lambda m: m.clone().index_fill_(-1, torch.tensor([0]), float("nan")),
    "infinity": lambda m: m.half().index_fill_(-1, torch.tensor([0]), float("-inf")),
}


@pytest.mark.parametrize("name", ["encodec", "emu3-vq", "autoencoder-kl"])
def test_bad_media_are_named(name):
    built, (good, *_) = tokenizer(name), media(name)
    wanted = r"floats \[1, samples\] wanted" if name == "encodec" else r"floats \[3, height, width\] wanted"
    for kind, spoil in BAD.items():
        with pytest.raises(PretrainedError, match="medium 1: .*" + ("not finite" if kind in ("nan", "infinity") else wanted)):
            built.encode([good, spoil(good)])


def test_a_model_that_gives_another_grid_is_noticed(monkeypatch):
    built = tokenizer("mimi")
    monkeypatch.setattr(built, "grid", lambda shape: (5,))
    with pytest.raises(PretrainedError, match=r"medium 0: MimiModel gives \[4, 4\] codes where the grid is \[5\]"):
        built.encode(media("mimi"))


@pytest.mark.parametrize("name", ["dac", "autoencoder-kl"])
def test_an_empty_list_is_an_empty_batch(name):
    built = tokenizer(name)
    out = built.encode([])
    assert len(out.lengths) == 0
    assert built.decode(out) == []


@pytest.mark.parametrize("name", ["mimi", "diffusers-vq", "autoencoder-dc"])
def test_mode_autocast_and_dtype_do_not_change_codes(name):
    built, batch = tokenizer(name), [m.half() for m in media(name)]
    expected = encoded(built, [m.float() for m in batch])
    built.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoded(built, batch), expected)
    assert built.training
    assert not expected.requires_grad
