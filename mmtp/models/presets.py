"""Named sizes. A recipe names one and overrides what it likes."""

from collections.abc import Callable

from mmtp.models.backbone import BackboneConfig
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.unified import UnifiedModel
from mmtp.registry import UnknownNameError
from mmtp.stream.vocab import VocabLayout


def tiny(layout: VocabLayout) -> UnifiedModel.Config:
    """A model for tests: runs everything, learns little."""
    backbone = BackboneConfig(width=64, depth=2, num_heads=2, num_kv_heads=1, head_dim=32, mlp_width=128)
    return UnifiedModel.Config(layout=layout, backbone=backbone, head=SequentialHead.Config(mtp_depth=2))


def demo(layout: VocabLayout) -> UnifiedModel.Config:
    """Learns a toy world on two CPU cores in minutes."""
    backbone = BackboneConfig(width=192, depth=6, num_heads=3, num_kv_heads=1, head_dim=64, mlp_width=512)
    return UnifiedModel.Config(layout=layout, backbone=backbone, head=SequentialHead.Config(mtp_depth=3))


def small(layout: VocabLayout) -> UnifiedModel.Config:
    """About 13 million parameters: an hour on two CPU cores. Deep and narrow, for a draft costs one block of many."""
    backbone = BackboneConfig(width=256, depth=10, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=704)
    return UnifiedModel.Config(layout=layout, backbone=backbone, head=SequentialHead.Config(mtp_depth=4))


PRESETS: dict[str, Callable[[VocabLayout], UnifiedModel.Config]] = {"tiny": tiny, "demo": demo, "small": small}


def preset(name: str, layout: VocabLayout) -> UnifiedModel.Config:
    """The preset's configuration over a vocabulary.

    Raises:
        UnknownNameError: lists the presets.
    """
    if name not in PRESETS:
        raise UnknownNameError(f"no model preset is called {name!r}; known: {', '.join(sorted(PRESETS))}")
    return PRESETS[name](layout)
