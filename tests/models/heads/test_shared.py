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
