"""Quantizers: VQ, SimVQ, IBQ (vector), FSQ (scalar), LFQ, BSQ (binary), and residual VQ, FSQ and LFQ, behind one contract (base)."""

from mmtp.tokenizers.quantizers.base import LibraryQuantizer, Quantized, Quantizer, QuantizerConfig
from mmtp.tokenizers.quantizers.binary import BSQ, LFQ
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
    "Quantized",
    "Quantizer",
    "QuantizerConfig",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualVQ",
    "SimVQ",
]
