"""Tokens by states in one call, beside the same by calls of torch."""

from collections.abc import Callable

import pytest
import torch

from mmtp.decode.sample import Noise, Sampling, choose
from mmtp.nn import native
from mmtp.nn.norm import RMSNorm
from mmtp.nn.picking import Pick, pick

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"panels": native.panels, "pairs": native.pairs, "rounded": native.pairs}
CUTS = {
    "greedy": Sampling(temperature=0.0),
    "all": Sampling(),
    "cool": Sampling(temperature=0.7),
    "top-k": Sampling(temperature=1.3, top_k=5),
    "top-p": Sampling(top_p=0.6),
    "min-p": Sampling(min_p=0.2),
    "top-k and min-p": Sampling(top_k=20, min_p=0.1),
}


def given(width: int, outputs: int, layout: str) -> tuple[torch.Tensor, RMSNorm, torch.Tensor]:
    """States, a norm and weights that bfloat16 can hold; where states are rounded, such that it changes nothing."""
    generator = torch.Generator().manual_seed(width + outputs)
    norm = RMSNorm(width)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.2 * torch.randn(width, generator=generator))
    states, weights = torch.randn(40, width, generator=generator), torch.randn(outputs, width, generator=generator)
    return states, norm, (3 * weights / width**0.5).bfloat16().float()


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("width", "outputs"), [(64, 200), (50, 33), (96, 5)])
def test_tokens_are_those_that_torch_chooses(width: int, outputs: int, layout: str, cut: str) -> None:
    states, norm, weights = given(width, outputs, layout)
    sampling, noise = CUTS[cut], Noise(3)
    with torch.inference_mode():
        normed = norm(states)
        logits = (normed.bfloat16().float() if layout == "rounded" else normed) @ weights.T
        wanted = [draft.token for draft in choose(logits, sampling, noise, range(40))]
        picks = [Pick(i, sampling.choosing, noise.at(i, outputs) if sampling.temperature else None) for i in range(40)]
        packed = LAYOUTS[layout](weights)
        tokens = pick(states, norm.weight, norm.eps, packed, outputs, picks, layout == "rounded")
        assert tokens == wanted and len(set(tokens)) > 2
        # Whatever stands beside it, and by any number of threads.
        assert [pick(states, norm.weight, norm.eps, packed, outputs, [each], layout == "rounded")[0] for each in picks] == tokens
        threads = torch.get_num_threads()
        torch.set_num_threads(3)
        assert pick(states, norm.weight, norm.eps, packed, outputs, picks[::-1], layout == "rounded") == tokens[::-1]
        torch.set_num_threads(threads)


def test_guided_rows_stand_beside_others() -> None:
    states, norm, weights = given(64, 300, "panels")
    with torch.inference_mode():
        logits = norm(states) @ weights.T
        picks, wanted = [], []
        for i in range(20):
            guide, weight = (39 - i, 1.0 + 0.3 * i) if i % 3 else (None, 1.0)
            sampling, noise = (Sampling(temperature=0.5), Noise(i).at(7, 300)) if i % 2 else (Sampling(temperature=0.0), None)
            picks.append(Pick(i, sampling.choosing, noise, guide, weight))
            own = logits[i] if guide is None else logits[guide] + weight * (logits[i] - logits[guide])
            wanted.append(int((own if noise is None else own / 0.5 + noise).argmax()))
        assert pick(states, norm.weight, norm.eps, native.panels(weights), 300, picks) == wanted


def test_top_p_of_what_top_k_has_left_is_chosen_by_torch() -> None:
    assert Sampling(top_k=5, top_p=0.5).choosing is None
    assert Sampling(temperature=0.0, top_k=5, top_p=0.5).choosing is not None  # it takes the first anyhow
