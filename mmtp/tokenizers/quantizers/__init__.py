"""Quantizers behind one contract (base).

VQ, SimVQ, IBQ (vector), FSQ (scalar), LFQ, BSQ (binary), residual VQ, FSQ and LFQ (residual), and a pyramid of grids (multi_scale).
"""

from mmtp.tokenizers.quantizers.base import LibraryQuantizer, Quantized, Quantizer, QuantizerConfig, refuse_scales
from mmtp.tokenizers.quantizers.binary import BSQ, LFQ
from mmtp.tokenizers.quantizers.multi_scale import MultiScaleVQ
from mmtp.tokenizers.quantizers.residual import ResidualFSQ, ResidualLFQ, ResidualVQ
from mmtp.tokenizers.quantizers.scalar import FSQ
from mmtp.tokenizers.quantizers.vector import IBQ, VQ, SimVQ

__all__ = [
    "BSQ",
    "FSQ",
    "IBQ",
    "LFQ",
    "VQ",
    "LibraryQuantizer",
    "MultiScaleVQ",
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualVQ",
    "SimVQ",
    "refuse_scales",
]
