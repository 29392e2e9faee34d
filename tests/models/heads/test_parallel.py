import torch

from mmtp.models.heads.base import Places
from mmtp.models.heads.parallel import ParallelHead
from mmtp.nn.attention import document_mask
from mmtp.testing.heads import BACKBONE
from mmtp.types import Modality


def test_offsets_read_the_backbone_alone():
    torch.manual_seed(0)
    head = ParallelHead(ParallelHead.Config(mtp_depth=3), BACKBONE, (Modality.TEXT,))
    hidden, embedded = torch.randn(2, 1, 8, BACKBONE.width)
    flat = torch.zeros(1, 8, dtype=torch.long)
    places = Places(torch.arange(8)[None, :, None].expand(1, -1, 3), flat, flat, document_mask(flat))
    first, second = (head(hidden, tokens, places) for tokens in (embedded, embedded + 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
