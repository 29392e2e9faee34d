import pytest
import torch
import torch.nn.functional as F
from vector_quantize_pytorch import VectorQuantize

from mmtp.tokenizers.quantizers import IBQ, VQ, SimVQ
from mmtp.tokenizers.quantizers.vector import entropy_loss


def clusters(count: int, centres: torch.Tensor) -> torch.Tensor:
    """Latents near some centres."""
    return (centres[torch.randint(len(centres), (count,))] + 0.05 * torch.randn(count, centres.shape[1]))[None]


def test_vq_defaults_do_not_collapse():
    quantizer = VQ(VQ.Config(codebook_size=128), dim=16)
    centres = torch.randn(200, 16)
    for _ in range(60):
        quantizer(clusters(512, centres))
    assert len(quantizer.eval()(clusters(4000, centres)).ids.unique()) > 100


@pytest.mark.parametrize("config", [SimVQ.Config(codebook_size=128), IBQ.Config(codebook_size=128)])
def test_learned_codebooks_do_not_collapse(config):
    quantizer, centres = config.build(dim=16), torch.randn(200, 16)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=1e-2)
    for _ in range(150):
        latents = clusters(512, centres)
        out = quantizer(latents)
        optimizer.zero_grad()
        (F.mse_loss(out.latents, latents) + out.loss).backward()
        optimizer.step()
    out = quantizer.eval()(clusters(4000, centres))
    assert len(out.ids.unique()) > 90


def test_index_back_propagation_reaches_every_entry():
    quantizer = IBQ(IBQ.Config(codebook_size=64, entropy=0.0, commitment=0.0), dim=8)
    out = quantizer(torch.randn(1, 4, 8))
    out.latents.square().sum().backward()
    assert torch.all(quantizer.codebook.grad.abs().sum(1) > 0)
    assert len(out.ids.unique()) <= 4


def test_entropy_loss_against_its_definition():
    probabilities = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]])
    each = torch.special.entr(probabilities).sum(1).mean()
    over_all = torch.special.entr(probabilities.mean(0)).sum()
    torch.testing.assert_close(entropy_loss(probabilities.clamp(min=1e-30).log()), each - over_all)


@pytest.mark.parametrize("latents", [64, 256, 1024])
def test_few_latents_per_entry_do_not_make_entries_dead(latents):
    """Evenly used codes live on, however few latents a batch has for each of them."""
    torch.manual_seed(0)
    quantizer, centres = VQ(VQ.Config(codebook_size=256, decay=0.9), dim=16), F.normalize(torch.randn(256, 16), dim=-1)
    for _ in range(300):
        quantizer(clusters(latents, centres))
    before = quantizer.vq.codebook.clone()
    for _ in range(10):
        quantizer(clusters(latents, centres))
    moved = (quantizer.vq.codebook - before).norm(dim=-1)
    assert (moved > 0.5).float().mean() < 0.1


def test_unused_entries_are_replaced():
    torch.manual_seed(0)
    quantizer, centres = VQ(VQ.Config(codebook_size=16, decay=0.9), dim=16), torch.randn(16, 16)
    quantizer(clusters(512, centres[:1]))
    for _ in range(100):
        quantizer(clusters(512, centres))
    assert len(quantizer.eval()(clusters(1000, centres)).ids.unique()) == 16


@pytest.mark.parametrize("rotation_trick", [True, False])
def test_the_rotation_trick_is_no_cure_of_collapse(rotation_trick):
    """A young encoder's latents are all alike when the codebook starts: without replacement, most entries die there, trick or not."""
    centres, used = torch.randn(200, 16), {}
    for share in (0.0, VQ.Config().dead_code_share):
        config = VQ.Config(codebook_size=128, cosine=False, decay=0.9, dead_code_share=share, rotation_trick=rotation_trick)
        quantizer = config.build(dim=16)
        for step in range(40):
            quantizer(clusters(256, centres if step else centres[:1]).requires_grad_())
        used[share] = len(quantizer.eval()(clusters(4000, centres)).ids.unique())
    assert used[0.0] < 64
    assert used[VQ.Config().dead_code_share] > 115


def test_the_library_defaults_collapse_where_ours_do_not():
    centres = torch.randn(200, 16) + 1
    theirs, ours = VectorQuantize(dim=16, codebook_size=128), VQ(VQ.Config(codebook_size=128), dim=16)
    for _ in range(40):
        latents = clusters(512, centres)
        theirs(latents)
        ours(latents)
    latents = clusters(4000, centres)
    assert len(theirs.eval()(latents)[1].unique()) < 64
    assert len(ours.eval()(latents).ids.unique()) > 115
