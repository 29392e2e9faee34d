import copy
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F

from mmtp.config import ConfigError, build_config
from mmtp.tokenizers.quantizers import MultiScaleVQ
from mmtp.tokenizers.quantizers.multi_scale import ScalesError
from mmtp.tokenizers.quantizers.vector import codebook_of

SCALES = (1, 2, 3, 4)
ENDS = list(accumulate(n * n for n in SCALES))


def planes(count: int) -> torch.Tensor:
    """Latents in which coarse and fine grids both have something to say."""
    parts = (F.interpolate(torch.randn(count, 8, n, n) / n**0.5, size=(4, 4), mode="bicubic") for n in SCALES)
    return sum(parts).flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    quantizer = MultiScaleVQ(MultiScaleVQ.Config(scales=SCALES, codebook_size=64, codebook_dim=8), dim=8)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=1e-2)
    errors = []
    for _ in range(80):
        latents = planes(32)
        out = quantizer(latents)
        error = F.mse_loss(out.latents, latents)
        optimizer.zero_grad()
        (error + out.loss).backward()
        optimizer.step()
        errors.append(error.item())
    return quantizer.eval(), errors


def test_training_comes_nearer(trained):
    _, errors = trained
    assert sum(errors[-10:]) < 0.7 * sum(errors[:10])


def test_every_further_scale_comes_nearer(trained):
    quantizer, latents = trained[0], planes(200)
    ids = quantizer(latents).ids
    errors = [F.mse_loss(quantizer.lookup(ids[:, :end]), latents) for end in ENDS]
    assert all(later < earlier for earlier, later in pairwise(errors))


def test_codes_give_exactly_the_latents_that_went_to_the_decoder(trained):
    out = trained[0](planes(5))
    assert torch.equal(trained[0].lookup(out.ids), out.latents)


def test_codes_do_not_collapse(trained):
    ids = trained[0](planes(500)).ids
    assert len(ids.unique()) > 58
    assert len(ids[:, 0].unique()) > 12  # one code for all of a picture


def test_codes_are_those_of_algorithm_1(trained):
    """The paper's loop, written plainly."""
    quantizer, latents = trained[0], planes(3)
    codebook = quantizer.vq.codebook
    f = quantizer.project_in(latents).transpose(1, 2).unflatten(2, (4, 4))
    f_hat, rows = torch.zeros_like(f), []
    for k, n in enumerate(SCALES):
        r = F.interpolate(f - f_hat, size=(n, n), mode="area").flatten(2).transpose(1, 2)
        rows.append(torch.cdist(r, codebook).argmin(-1))
        z = codebook[rows[-1]].transpose(1, 2).unflatten(2, (n, n))
        z = F.interpolate(z, size=(4, 4), mode="bicubic")
        f_hat = f_hat + 0.5 * z + 0.5 * quantizer.smooth[k](z)
    out = quantizer(latents)
    assert torch.equal(out.ids[..., 0], torch.cat(rows, 1))
    torch.testing.assert_close(out.latents, quantizer.project_out(f_hat.flatten(2).transpose(1, 2)), atol=1e-5, rtol=0)


def test_the_codebook_moves_once_a_step_on_all_scales(trained):
    quantizer = copy.deepcopy(trained[0]).train()
    before = codebook_of(quantizer.vq).cluster_size.sum()
    quantizer(planes(8))
    uses = 8 * ENDS[-1]
    torch.testing.assert_close(codebook_of(quantizer.vq).cluster_size.sum(), before * 0.99 + uses * 0.01, rtol=1e-3, atol=0)


def test_neighbouring_scales_share_convolutions():
    quantizer = MultiScaleVQ(MultiScaleVQ.Config(scales=(1, 2, 3, 4, 6, 8), codebook_size=8), dim=4).eval()
    seen = []
    for i, smooth in enumerate(quantizer.smooth):
        smooth.register_forward_pre_hook(lambda *_, i=i: seen.append(i))
    quantizer(torch.randn(1, 64, 4))
    assert seen == [0, 0, 1, 2, 2, 3]


def test_grids_of_another_size_are_refused(trained):
    with pytest.raises(ScalesError, match="9 latents given, a grid of 4x4 is wanted"):
        trained[0](torch.randn(1, 9, 8))
    with pytest.raises(ScalesError, match="6 codes given; the first scales have 1, 5, 14, 30"):
        trained[0].lookup(torch.zeros(1, 6, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scales": [1, 4, 4]}, r"scales \[1, 4, 4\]: .* more than the one before"),
        ({"scales": []}, r"scales \[\]"),
        ({"scales": [0, 2]}, r"scales \[0, 2\]"),
        ({"scales": [1, 2], "convolutions": 3}, "convolutions 3: 1 to 2 are wanted"),
    ],
)
def test_pyramids_that_cannot_be_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        build_config("quantizer", {"type": "multi-scale-vq", **given})
