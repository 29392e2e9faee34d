"""Tokenizers of transformers and diffusers under the contract of :mod:`mmtp.tokenizers.base`.

``Mimi.from_pretrained_model("kyutai/mimi")`` loads what the other library saved; from there on it is a tokenizer like any other:
``save_pretrained`` writes it as a folder of ours, which loads offline. The libraries (``pip install 'mmtp[hf]'``) are imported when a model
is built, not before.
"""

from mmtp.tokenizers.pretrained.base import PretrainedError, Wrapped
from mmtp.tokenizers.pretrained.codecs import Dac, Encodec, Mimi
from mmtp.tokenizers.pretrained.latents import AutoencoderDC, AutoencoderKL
from mmtp.tokenizers.pretrained.pictures import ChameleonVQ, DiffusersVQ, Emu3VQ, JanusVQ
from mmtp.tokenizers.pretrained.quick import Precision
from mmtp.tokenizers.pretrained.videos import VidTok

__all__ = [
    "AutoencoderDC",
    "AutoencoderKL",
    "ChameleonVQ",
    "Dac",
    "DiffusersVQ",
    "Emu3VQ",
    "Encodec",
    "JanusVQ",
    "Mimi",
    "Precision",
    "PretrainedError",
    "VidTok",
    "Wrapped",
]
