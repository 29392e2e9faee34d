import pytest
import torch

from mmtp.models.loss import LossConfig
from mmtp.train.losses.uncertainty import Uncertainty
from mmtp.types import Modality

LOSSES, WEIGHTS = {Modality.TEXT: 3.0, Modality.IMAGE: 8.0}, {"image": 2.0}


def test_both_halves_make_the_gradient_of_the_whole() -> None:
    uncertainty = Uncertainty()
    with torch.no_grad():
        uncertainty.log_variance[Modality.IMAGE.index] = 0.7
    losses = {modality: torch.tensor(loss, requires_grad=True) for modality, loss in LOSSES.items()}
    s = uncertainty.log_variance
    whole = sum(
        WEIGHTS.get(m, 1.0) * (torch.exp(-s[m.index]) * losses[m] + 0.5 * s[m.index])  # Kendall et al., eq. 10, with s = log sigma^2
        for m in losses
    )
    wanted, *of_losses = torch.autograd.grad(whole, [s, *losses.values()])
    (found,) = torch.autograd.grad(uncertainty(LOSSES, WEIGHTS), s)
    torch.testing.assert_close(found, wanted)
    factors = uncertainty.factors()
    assert [WEIGHTS.get(m, 1.0) * factors[m] for m in LOSSES] == pytest.approx([float(g) for g in of_losses])


def test_parts_end_up_of_one_size_and_weights_are_shares() -> None:
    uncertainty = Uncertainty()
    optimizer = torch.optim.AdamW(uncertainty.parameters(), lr=0.05, weight_decay=0)
    for _ in range(300):
        optimizer.zero_grad()
        uncertainty(LOSSES, WEIGHTS).backward()
        optimizer.step()
    assert {m: uncertainty.factors()[m] * loss for m, loss in LOSSES.items()} == pytest.approx(dict.fromkeys(LOSSES, 0.5), rel=1e-2)
    assert uncertainty.factors()[Modality.AUDIO] == 1  # none was there


def test_a_rate_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"uncertainty_lr -0\.1 is below 0"):
        LossConfig(uncertainty_lr=-0.1)
