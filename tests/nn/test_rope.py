import torch

from mmtp.nn.rope import Rope


def test_frequencies_stay_float32_whatever_weights_become() -> None:
    rope, positions = Rope(16, 1e4), torch.tensor([[[5, 3, 1], [900, 40, 77]]])
    wanted = rope(positions)
    for changed in (torch.nn.Sequential(rope).bfloat16()[0], rope.half(), rope.to("cpu", torch.bfloat16)):
        assert changed.frequencies.dtype == torch.float32
        assert all(torch.equal(one, other) for one, other in zip(changed(positions), wanted, strict=True))
    assert rope.to("meta").frequencies.is_meta
