"""Weights to and from the layouts of Qwen3, Llama and Mistral, so that any such checkpoint can be a start, and what was trained can leave.

They are one layout: Qwen3 normalises queries and keys, Llama does not (``qk_norm``); Mistral is Llama with a window of attention.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmtp.models.backbone import BackboneConfig
from mmtp.nn.rope import RopeScaling
from mmtp.types import MmtpError

MODEL_TYPES = {"qwen3": True, "llama": False, "mistral": False}
"""``model_type`` of the configurations that are read and written -> ``qk_norm``."""

WANTED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "partial_rotary_factor": 1.0}
"""Values that fields must have where they are given."""

MAX_POSITIONS = 32768
"""Written as ``max_position_embeddings``, for this backbone knows no greatest position; of models with scaled rotary frequencies, the
original context times the factor."""


MISTRAL_WINDOW = 4096
"""Window of a Mistral whose configuration names none, as transformers has it."""


class Qwen3Error(MmtpError):
    """A checkpoint that is neither Qwen3- nor Llama-like: names the field or the weight."""


def backbone_config(config: Mapping[str, Any]) -> BackboneConfig:
    """Our sizes from a ``config.json`` of Qwen3, Llama or Mistral.

    Raises:
        Qwen3Error: the file asks for something that this backbone does not do.
    """
    if (kind := config.get("model_type")) not in MODEL_TYPES:
        raise Qwen3Error(f"model_type: {kind!r} is not supported; {', '.join(map(repr, MODEL_TYPES))} are")
    for name, wanted in WANTED.items():
        if (found := config.get(name)) is not None and found != wanted:
            raise Qwen3Error(f"{name}: {found!r} is not supported, {wanted!r} is")
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm_eps")
    if missing := [name for name in needed if name not in config]:
        raise Qwen3Error(f"{missing[0]}: is missing in the checkpoint's config.json")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads = config["num_attention_heads"]
    return BackboneConfig(
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        mlp_width=config["intermediate_size"],
        rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 1e4),
        rope_scaling=_scaling(rope),
        norm_eps=config["rms_norm_eps"],
        qk_norm=MODEL_TYPES[kind],
        window=_window(config),
    )


def checkpoint_config(config: BackboneConfig) -> dict[str, Any]:
    """The inverse of :func:`backbone_config`."""
    kind = "qwen3" if config.qk_norm else "mistral" if config.window else "llama"
    window: dict[str, Any] = {"sliding_window": config.window} if config.window else {}
    if window and config.qk_norm:
        window |= {"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["sliding_attention"] * config.depth}
    scaling, longest = {"rope_type": "default"}, MAX_POSITIONS
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **vars(config.rope_scaling)}
        longest = int(config.rope_scaling.factor * config.rope_scaling.original_max_position_embeddings)
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": longest,
        # Before version 5, transformers read the base from the one, and the scaling from the other of these.
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else scaling,
        "rope_parameters": scaling | {"rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        **window,
    }


def _window(config: Mapping[str, Any]) -> int:
    """Of all layers.

    Raises:
        Qwen3Error: only some of them have it.
    """
    if config["model_type"] == "mistral":
        return config.get("sliding_window", MISTRAL_WINDOW) or 0
    if not config.get("use_sliding_window") or not config.get("sliding_window"):
        return 0
    depth, first = config["num_hidden_layers"], config.get("max_window_layers", 28)
    layers = config.get("layer_types") or ["full_attention"] * min(first, depth) + ["sliding_attention"] * (depth - first)
    if "sliding_attention" not in layers:
        return 0
    if full := sum(kind != "sliding_attention" for kind in layers):
        raise Qwen3Error(f"sliding_window: {full} of {len(layers)} layers have none, and here all have it or none has")
    return config["sliding_window"]


def _scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise Qwen3Error(f"rope_type: {kind!r} is not supported, 'default' and 'llama3' are")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


def from_qwen3(state: Mapping[str, Tensor], config: BackboneConfig) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Splits a causal-LM state dict.

    Returns:
        The backbone's state dict, the embedding table ``[v, d]`` and the unembedding ``[v, d]`` (the same tensor where tied).

    Raises:
        Qwen3Error: names the first weight that is missing, or that the backbone has no place for (a bias).
    """
    out = {"norm.weight": take(state, "model.norm.weight")}
    for i in range(config.depth):
        out |= block_from_qwen3(state, config, f"model.layers.{i}", f"blocks.{i}")
    embedding = take(state, "model.embed_tokens.weight")
    return out, embedding, state.get("lm_head.weight", embedding)


def to_qwen3(state: Mapping[str, Tensor], config: BackboneConfig, embedding: Tensor, unembedding: Tensor) -> dict[str, Tensor]:
    """The inverse of :func:`from_qwen3`; loads into ``Qwen3ForCausalLM`` of transformers, without ``qk_norm`` into ``LlamaForCausalLM``.

    Raises:
        Qwen3Error: media have weights of their own, or there is cross-attention.
    """
    if config.cross_attention_every:
        raise Qwen3Error(f"cross_attention_every = {config.cross_attention_every}: Qwen3's layout has no place for cross-attention")
    if config.modality_specific != "none":
        raise Qwen3Error(f"modality_specific = {config.modality_specific!r}: Qwen3's layout has no place for weights of single media")
    if config.cross_attention_every:
        raise Qwen3Error(f"cross_attention_every = {config.cross_attention_every}: Qwen3's layout has no place for cross-attention")
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
        raise Qwen3Error(f"the checkpoint has no {name!r}; is it a Qwen3- or Llama-like causal language model?")
    return state[name]


def block_from_qwen3(state: Mapping[str, Tensor], config: BackboneConfig, theirs: str, ours: str) -> dict[str, Tensor]:
    """One block's weights under our names; ``theirs`` and ``ours`` are the prefixes.

    Raises:
        Qwen3Error: names the first weight that is missing, or that the block has no place for (a bias).
    """
    same = _same(config)
    joined = {"attention.qkv": [f"self_attn.{n}_proj" for n in "qkv"], "mlp.gate_up": [f"mlp.{n}_proj" for n in ("gate", "up")]}
    out = {f"{ours}.{mine}": take(state, f"{theirs}.{name}") for mine, name in same.items()}
    for mine, parts in joined.items():
        out[f"{ours}.{mine}.weight"] = torch.cat([take(state, f"{theirs}.{part}.weight") for part in parts])
    known = {*same.values(), *(f"{part}.weight" for parts in joined.values() for part in parts)}
    for name in state:
        part = name.removeprefix(f"{theirs}.")
        if part != name and part.startswith(("self_attn.", "mlp.")) and part not in known and not part.endswith("rotary_emb.inv_freq"):
            raise Qwen3Error(f"the checkpoint has a weight {name!r}, for which this backbone has no place")
    return out


def block_to_qwen3(state: Mapping[str, Tensor], config: BackboneConfig, ours: str, theirs: str) -> dict[str, Tensor]:
    """The inverse of :func:`block_from_qwen3`."""
    q, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = state[f"{ours}.attention.qkv.weight"].split((q, k, k))
    out = {f"{theirs}.self_attn.{n}_proj.weight": part for n, part in zip("qkv", parts, strict=True)}
    parts = state[f"{ours}.mlp.gate_up.weight"].chunk(2)
    out |= {f"{theirs}.mlp.{n}_proj.weight": part for n, part in zip(("gate", "up"), parts, strict=True)}
    return out | {f"{theirs}.{name}": state[f"{ours}.{mine}"] for mine, name in _same(config).items()}


def _same(config: BackboneConfig) -> dict[str, str]:
    """Weights of a block that are the same on both sides, ours -> theirs."""
    norms = {f"attention.{n}_norm.weight": f"self_attn.{n}_norm.weight" for n in "qk"} if config.qk_norm else {}
    return norms | {
        "attention_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        "attention.out.weight": "self_attn.o_proj.weight",
        "mlp.down.weight": "mlp.down_proj.weight",
    }
