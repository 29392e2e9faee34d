import pytest
import torch
from torch import nn

from mmtp.hub import from_pretrained, save_pretrained
from mmtp.tokenizers.pretrained import Precision
from mmtp.tokenizers.pretrained import quick as module
from mmtp.tokenizers.pretrained.quick import PrecisionError, QuickQuantizer, quick_copy
from tests.tokenizers.pretrained.common import CODECS, QUANTIZERS, adapter, media, theirs, tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]

NAMES = [name for name in (*CODECS, *QUANTIZERS) if issubclass(adapter(name), QuickQuantizer)]
ENCODEC = [{}, {"norm_type": "time_group_norm"}, {"use_causal_conv": False}, {"pad_mode": "constant"}]
MODELS = [("dac", {}), ("janus-vq", {}), *(("encodec", settings) for settings in ENCODEC)]


def inputs(name, part, model, length):
    if name == "janus-vq":
        return torch.randn(2, *((3, 16, 16) if part == "encoder" else (32, 4, 4)))
    return torch.randn(2, 1 if part == "encoder" else model.config.hidden_size, length)


def test_which_adapters_are_quick():
    assert NAMES == ["encodec", "dac", "janus-vq"]


@pytest.mark.parametrize("few", [0, 256])
@pytest.mark.parametrize(("name", "settings"), MODELS)
def test_quick_copies_give_what_the_originals_give(name, settings, few, monkeypatch):
    monkeypatch.setattr(module, "FEW", few)  # convolutions, or products of matrices
    model = theirs(name, **settings)
    for part in ("encoder", "decoder"):
        original = getattr(model, part)
        copy, half = quick_copy(original, torch.float32), quick_copy(original, torch.bfloat16)
        assert not [p for p in copy.parameters() if p.requires_grad]
        for length in (12, 37, 300):
            x = inputs(name, part, model, length)
            with torch.no_grad():
                expected, spread = original(x), original(x).std()
                torch.testing.assert_close(copy(x), expected, rtol=0, atol=1e-5 * float(spread) + 4e-5)
                assert half(x.bfloat16()).dtype == torch.bfloat16
                # DAC's snakes turn small errors of random weights' large activations into large ones.
                assert (half(x.bfloat16()) - expected).square().mean().sqrt() < (0.2 if name == "dac" else 0.05) * spread


@pytest.mark.parametrize("kernel", [3, 4, 9])
def test_upsampling_of_any_multiple_of_the_stride(kernel):
    layer = nn.ConvTranspose1d(4, 5, kernel, 3, padding=1)
    x = torch.randn(2, 4, 7)
    copy = quick_copy(nn.Sequential(layer), torch.float32)[0]
    assert isinstance(copy, nn.ConvTranspose1d) == (kernel == 4)
    with torch.no_grad():
        torch.testing.assert_close(copy(x), layer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elu_is_exact_near_zero(dtype):
    x = torch.linspace(-8, 3, 4001).to(dtype)
    exact = torch.nn.functional.elu(x.double())
    error = (quick_copy(nn.ELU(), dtype)(x).double() - exact).abs()
    assert (error < (1e-7 if dtype == torch.float32 else 0.004) + (0 if dtype == torch.float32 else 2**-7) * exact.abs()).all()
    if dtype == torch.bfloat16:
        small = x.abs() < 0.2
        assert (error[small] <= 2**-6 * exact[small].abs()).all()


@pytest.mark.parametrize("name", NAMES)
def test_precision_of_decoding_does_not_touch_codes(name, tmp_path):
    built, batch = tokenizer(name), media(name)
    codes, fingerprint = built.encode(batch), built.spec.fingerprint
    built.precision = Precision(decode="float32")
    exact = built.decode(codes)
    assert torch.equal(built.encode(batch).ids, codes.ids)
    built.precision = Precision(decode="bfloat16")
    assert torch.equal(built.encode(batch).ids, codes.ids)
    half = built.decode(codes)
    assert all(m.dtype == torch.float32 for m in half)
    differences = [float((a - b).abs().max()) for a, b in zip(exact, half, strict=True)]
    assert 0 < max(differences) < (1.0 if name == "dac" else 0.1)
    assert built.spec.fingerprint == fingerprint
    assert from_pretrained(save_pretrained(built, tmp_path)).precision == Precision()


@pytest.mark.parametrize("name", NAMES)
def test_encoding_in_bfloat16_is_for_whoever_chooses_it(name):
    built = tokenizer(name)
    x = inputs(name, "encoder", built.model, 96)
    with torch.no_grad():
        exact = built.run("encoder", x)
        built.precision = Precision(encode="bfloat16")
        half = built.run("encoder", x)
    assert half.dtype == exact.dtype == torch.float32
    assert 1e-4 < (half - exact).std() / exact.std() < 0.2
    (medium, *_) = media(name)
    assert built.encode([medium]).ids.shape[2:] == built.grid(medium.shape[1:])


@pytest.mark.parametrize("name", NAMES)
def test_changed_weights_are_noticed(name):
    built, batch = tokenizer(name), media(name)
    built.precision = Precision(decode="float32")
    codes = built.encode(batch)
    before = built.decode(codes)
    other = tokenizer(name, seed=1)
    other.precision = built.precision
    built.load_state_dict(other.state_dict())
    assert torch.equal(built.encode(batch).ids, other.encode(batch).ids)
    after = built.decode(codes)
    assert all(torch.equal(a, b) for a, b in zip(after, other.decode(codes), strict=True))
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("bfloat16", [True, False])
def test_automatic_precision_is_that_of_the_processor(bfloat16, monkeypatch):
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda: bfloat16)
    built = tokenizer("encodec")
    codes = built.encode(media("encodec"))
    automatic = built.decode(codes)
    built.precision = Precision(decode="bfloat16" if bfloat16 else "float32")
    assert all(torch.equal(a, b) for a, b in zip(automatic, built.decode(codes), strict=True))
    assert Precision().dtype("decoder", torch.device("cuda")) == torch.float32


@pytest.mark.parametrize(("fields", "message"), [({"encode": "auto"}, "precision of encode is 'auto'"), ({"decode": "half"}, "'half'")])
def test_unknown_precisions_are_refused(fields, message):
    with pytest.raises(PrecisionError, match=message):
        Precision(**fields)
