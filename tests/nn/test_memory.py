"""Modules without weights."""

import torch
from torch import nn

from mmtp.nn.memory import without_weights
from mmtp.nn.rope import Rope


def test_only_weights_of_modules_made_inside_are_shapes() -> None:
    state = torch.get_rng_state()
    with without_weights():
        made = nn.ModuleDict({"linear": nn.Linear(4, 6), "rope": Rope(8, 1e4)})
        made["linear"].bias.requires_grad_(False)
        tensor = torch.ones(2)
    assert all(p.is_meta for p in made.parameters()) and made["linear"].weight.shape == (6, 4)
    assert torch.equal(made["rope"].frequencies, Rope(8, 1e4).frequencies) and tensor.sum() == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert not nn.Linear(2, 2).weight.is_meta
