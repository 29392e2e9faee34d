"""Every adapter around a tiny model with random weights, and media for it."""

import importlib
from typing import Any

import torch
from torch import nn

from mmtp.registry import REGISTRY

STAGES = {"base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "embed_dim": 4, "latent_channels": 32}
BLOCKS = {
    "block_out_channels": [8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
SETTINGS: dict[str, dict[str, Any]] = {
    # 2, 3 or 4 codebooks of 16 entries at 100 frames per second; 12 samples per frame.
    "encodec": {
        "sampling_rate": 1200, "upsampling_ratios": [4, 3], "num_filters": 4, "hidden_size": 8, "num_lstm_layers": 1, "codebook_size": 16,
        "target_bandwidths": [0.8, 1.2, 1.6],
    },
    # An odd stride: the model alone drops samples when it encodes and comes out short when it decodes.
    "dac": {
        "sampling_rate": 1200, "downsampling_ratios": [2, 3], "encoder_hidden_size": 4, "decoder_hidden_size": 16, "n_codebooks": 3,
        "codebook_size": 16, "codebook_dim": 4,
    },
    "mimi": {
        "sampling_rate": 2400, "upsampling_ratios": [3, 2], "num_filters": 4, "hidden_size": 16, "codebook_size": 16, "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8, "num_quantizers": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "intermediate_size": 16, "upsample_groups": 16, "sliding_window": 8,
    },
    "janus-vq": {**STAGES, "num_embeddings": 32, "num_patches": 4},
    "emu3-vq": {**STAGES, "latent_channels": 4, "codebook_size": 32, "attn_resolutions": [2], "hidden_size": 32},
    "chameleon-vq": {**STAGES, "num_embeddings": 32},
    "diffusers-vq": {**BLOCKS, "num_vq_embeddings": 32},
    "vidtok": {
        "ch": 4, "ch_mult": [1, 2, 2], "z_channels": 2, "double_z": False, "num_res_blocks": 1, "tempo_ds": [1], "tempo_us": [1],
        "regularizer": "fsq", "codebook_size": 64,
    },
    "autoencoder-kl": BLOCKS,
    "autoencoder-dc": {
        "latent_channels": 8, "attention_head_dim": 4, "encoder_block_out_channels": [8, 8, 8], "decoder_block_out_channels": [8, 8, 8],
        "encoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"], "encoder_layers_per_block": [1, 1, 1],
        "decoder_block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"], "decoder_layers_per_block": [1, 1, 1],
        "encoder_qkv_multiscales": [[], [], [5]], "decoder_qkv_multiscales": [[], [], [5]],
    },
}  # fmt: skip
CODECS = ("encodec", "dac", "mimi")
SPREAD = {"encodec": 6.0, "emu3-vq": 0.05, "diffusers-vq": 0.3}
"""Spread of the codebooks, near that of what the random encoder gives, so that many codes come up."""

QUANTIZERS = ("janus-vq", "emu3-vq", "chameleon-vq", "diffusers-vq")
AUTOENCODERS = ("autoencoder-kl", "autoencoder-dc")


def adapter(name: str) -> Any:
    return REGISTRY.resolve("tokenizer", name)


def theirs(name: str, seed: int = 0, **settings: Any) -> nn.Module:
    """The other library's tiny model, every weight and codebook random."""
    cls = adapter(name)
    model_class = getattr(importlib.import_module(cls.package), cls.model_class)
    values = SETTINGS[name] | settings
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**values)) if cls.package == "transformers" else model_class(**values)
        for key, tensor in model.state_dict().items():
            if "embed" in key or key.endswith("codebook.weight"):
                tensor.normal_(std=SPREAD.get(name, 1.0))
            elif key.endswith("bias"):
                tensor.zero_()
            elif tensor.is_floating_point() and tensor.ndim > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
    return model.eval()


def tokenizer(name: str, seed: int = 0, **fields: Any) -> Any:
    return adapter(name).wrap(theirs(name, seed), **fields)


def media(name: str) -> list[torch.Tensor]:
    """Media of different sizes: whole cells, a rest, less than one cell; Janus' fill its grid."""
    generator = torch.Generator().manual_seed(1)
    channels, sizes = 3, ((16, 16), (9, 22), (1, 6))
    if name in CODECS:
        channels, sizes = 1, ((48,), (131,), (1,))
    elif name == "vidtok":
        sizes = ((3, 8, 12), (4, 9, 6), (1, 4, 5))
    elif name == "janus-vq":
        sizes = ((16, 16), (13, 15))
    out = [torch.rand(channels, *size, generator=generator) for size in sizes]
    return [2 * m - 1 for m in out] if name in CODECS else out
