import pytest

from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.heads.shared import SharedHead
from mmtp.models.unified import UnifiedModel
from mmtp.testing.heads import BACKBONE, LAYOUT


def test_one_module_serves_all_depths():
    shared, one, four = (
        UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE, head=head).build().num_parameters()
        for head in (SharedHead.Config(mtp_depth=4), SequentialHead.Config(mtp_depth=1), SequentialHead.Config(mtp_depth=4))
    )
    assert shared == one < four


def test_one_wide_block_has_the_parameters_of_several_narrow_ones():
    def size(**values: int) -> int:
        head = SharedHead.Config(mtp_depth=3, **values).build(backbone=BACKBONE, modalities=LAYOUT.modalities)
        return sum(p.numel() for p in head.parameters())

    assert size(mlp_width=2 * BACKBONE.mlp_width) - size() == 3 * BACKBONE.width * BACKBONE.mlp_width
    assert size(mlp_width=BACKBONE.mlp_width) == size()
    with pytest.raises(ValueError, match="mlp_width -1 is below 0"):
        SharedHead.Config(mlp_width=-1)
