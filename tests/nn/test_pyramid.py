import torch
import torch.nn.functional as F
from torch import nn

from mmtp.nn.pyramid import averaged, enlarged, scale_ends


def test_ends_count_the_cells_of_all_scales_so_far():
    assert scale_ends((1, 2, 3, 4)) == (1, 5, 14, 30) and scale_ends(()) == ()


def test_a_scale_adds_its_cells_enlarged_and_half_smoothed():
    scales, cells = (1, 2, 4), torch.randn(2, 4, 3)
    smooth = [lambda plane: 0 * plane, nn.Conv2d(3, 3, 3, padding=1)]
    plane = cells.transpose(1, 2).unflatten(2, (2, 2))
    wanted = F.interpolate(plane, size=(4, 4), mode="bicubic")
    torch.testing.assert_close(enlarged(cells, 1, scales, smooth), 0.5 * wanted)  # the first of two serves two of three scales
    last = torch.randn(2, 16, 3)
    plane = last.transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(enlarged(last, 2, scales, smooth), 0.5 * plane + 0.5 * smooth[1](plane))


def test_means_over_cells_go_row_by_row():
    plane = torch.arange(16.0).view(1, 1, 4, 4)
    assert averaged(plane, 2)[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(averaged(plane, 4)[0, :, 0], torch.arange(16.0))
