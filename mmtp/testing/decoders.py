"""Decoders for what hangs on their size, how long passes and rounds of decoding take: of random weights, or a trained one with as many idle
weights as are wanted.
"""

from dataclasses import replace

import torch

from mmtp.hub import from_pretrained
from mmtp.models.backbone import BackboneConfig
from mmtp.models.unified import UnifiedModel
from mmtp.stream.vocab import MediaEntry, Special, TextEntry, VocabLayout
from mmtp.types import Modality

SIZES = {
    "tiny": BackboneConfig(width=64, depth=2, num_heads=2, num_kv_heads=1, head_dim=32, mlp_width=128),
    "small": BackboneConfig(width=256, depth=10, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=704),
    "medium": BackboneConfig(width=384, depth=10, num_heads=6, num_kv_heads=2, head_dim=64, mlp_width=1024),
    "350m": BackboneConfig(width=1024, depth=24, num_heads=8, num_kv_heads=4, head_dim=128, mlp_width=3584),
    "1b": BackboneConfig(width=2048, depth=20, num_heads=16, num_kv_heads=8, head_dim=128, mlp_width=6144),
    "8b": BackboneConfig(width=4096, depth=36, num_heads=32, num_kv_heads=8, head_dim=128, mlp_width=12288),
}
"""Backbones of 0.07, 7, 16, 340, 1,010 and 6,950 million parameters."""
LAYOUT = VocabLayout(TextEntry("words", 4096), (MediaEntry(Modality.IMAGE, "pictures", codebook_sizes=(4096,)),), 64)


def decoder(model: str, precision: str = "float32", device: str = "cpu") -> UnifiedModel:
    """A model of a named size, or one of the zoo or a folder.

    Args:
        model: a name in ``SIZES``, of the zoo, or of a folder.
        precision: of its weights.
        device: where it is to be.
    """
    torch.manual_seed(0)
    if model in SIZES:
        with torch.device(device):
            net = UnifiedModel.Config(layout=LAYOUT, backbone=SIZES[model]).build()
    else:
        net = from_pretrained(model)
    return net.eval().to(device, getattr(torch, precision))


def widened(net: UnifiedModel, times: int) -> UnifiedModel:
    """A model that gives the same states and has more to read: feed-forward layers, those of a head too, so many times as wide, of which
    nothing reads what is new. So it writes the same tokens and its drafts stand as often, while a pass reads and multiplies by as many
    weights as one of a larger model.

    Args:
        net: whose media share their weights.
        times: 1 gives a copy.
    """
    size, own = net.config.backbone, net.state_dict()
    wide = replace(net.config, backbone=replace(size, mlp_width=times * size.mlp_width)).build().to(net.unembedding.weight)
    with torch.no_grad():
        for name, weight in wide.state_dict().items():
            if weight.shape == own[name].shape:
                weight.copy_(own[name])
            elif name.endswith("down.weight"):
                weight.zero_()[:, : own[name].shape[1]] = own[name]
            else:
                for half, given in zip(weight.chunk(2), own[name].chunk(2), strict=True):
                    half.copy_(given.repeat(times, 1))
    wide.ngrams, wide.refiner = net.ngrams, net.refiner
    return wide.eval()


def drawing(side: int) -> list[int]:
    """The start of a document that is a picture of so many codes a side."""
    return [int(Special.BOS), int(Special.BOI), LAYOUT.dim(side), LAYOUT.dim(side)]
