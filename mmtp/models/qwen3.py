"""Weights to and from Qwen3's layout, so that any such checkpoint can be a start, and what was trained can leave."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmtp.models.backbone import BackboneConfig
from mmtp.types import MmtpError


class Qwen3Error(MmtpError):
    """A checkpoint that is not Qwen3-like: names the field."""


def backbone_config(config: Mapping[str, Any]) -> BackboneConfig:
    """Our sizes from a Qwen3 ``config.json``.

    Raises:
        Qwen3Error: the file asks for something that this backbone does not do.
    """
    for name, wanted in (("attention_bias", False), ("hidden_act", "silu"), ("use_sliding_window", False)):
        if config.get(name, wanted) != wanted:
            raise Qwen3Error(f"{name}: {config[name]!r} is not supported, {wanted!r} is")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default":
        raise Qwen3Error(f"rope_type: {rope['rope_type']!r} is not supported, 'default' is")
    heads = config["num_attention_heads"]
    return BackboneConfig(
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        mlp_width=config["intermediate_size"],
        rope_theta=float(config.get("rope_theta") or rope["rope_theta"]),
        norm_eps=config["rms_norm_eps"],
    )


def from_qwen3(state: Mapping[str, Tensor], config: BackboneConfig) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Splits a Qwen3 causal-LM state dict.

    Returns:
        The backbone's state dict, the embedding table ``[v, d]`` and the unembedding ``[v, d]`` (the same tensor where tied).

    Raises:
        Qwen3Error: names the first weight that is missing.
    """
    out = {"norm.weight": take(state, "model.norm.weight")}
    for i in range(config.depth):
        out |= block_from_qwen3(state, f"model.layers.{i}", f"blocks.{i}")
    embedding = take(state, "model.embed_tokens.weight")
    return out, embedding, state.get("lm_head.weight", embedding)


def to_qwen3(state: Mapping[str, Tensor], config: BackboneConfig, embedding: Tensor, unembedding: Tensor) -> dict[str, Tensor]:
    """The inverse of :func:`from_qwen3`; loads into ``transformers.Qwen3ForCausalLM``.

    Raises:
        Qwen3Error: media have weights of their own.
    """
    if config.modality_specific != "none":
        raise Qwen3Error(f"modality_specific = {config.modality_specific!r}: Qwen3's layout has no place for weights of single media")
    out = {"model.embed_tokens.weight": embedding, "lm_head.weight": unembedding, "model.norm.weight": state["norm.weight"]}
    for i in range(config.depth):
        out |= block_to_qwen3(state, config, f"blocks.{i}", f"model.layers.{i}")
    return out


def take(state: Mapping[str, Tensor], name: str) -> Tensor:
    """A weight of a checkpoint.

    Raises:
        Qwen3Error: it has none of that name.
    """
    if name not in state:
        raise Qwen3Error(f"the checkpoint has no {name!r}; is it a Qwen3-like causal language model?")
    return state[name]


def block_from_qwen3(state: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """One block's weights under our names; ``theirs`` and ``ours`` are the prefixes."""
    out = {f"{ours}.{mine}": take(state, f"{theirs}.{name}") for mine, name in _SAME.items()}
    out[f"{ours}.attention.qkv.weight"] = torch.cat([take(state, f"{theirs}.self_attn.{n}_proj.weight") for n in "qkv"])
    out[f"{ours}.mlp.gate_up.weight"] = torch.cat([take(state, f"{theirs}.mlp.{n}_proj.weight") for n in ("gate", "up")])
    return out


def block_to_qwen3(state: Mapping[str, Tensor], config: BackboneConfig, ours: str, theirs: str) -> dict[str, Tensor]:
    """The inverse of :func:`block_from_qwen3`."""
    q, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = state[f"{ours}.attention.qkv.weight"].split((q, k, k))
    out = {f"{theirs}.self_attn.{n}_proj.weight": part for n, part in zip("qkv", parts, strict=True)}
    parts = state[f"{ours}.mlp.gate_up.weight"].chunk(2)
    out |= {f"{theirs}.mlp.{n}_proj.weight": part for n, part in zip(("gate", "up"), parts, strict=True)}
    return out | {f"{theirs}.{name}": state[f"{ours}.{mine}"] for mine, name in _SAME.items()}


_SAME = {
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
