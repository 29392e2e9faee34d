"""Multi-token-prediction modules to and from the layout of DeepSeek-V3's checkpoints.

There the modules follow the N layers of the backbone as layers N, N+1, …: each a block of the model with two norms, a projection
and the norm before the unembedding around it. Blocks are Qwen3's here (no latent attention, no experts), so what is exchanged are
modules of models whose blocks are such.

What a module does with its input is the same everywhere. What it is given is not: our heads read the backbone's states, and those of
the module before, ahead of the last norm, while transformers 5.23 gives both behind it. Modules that were trained the one way are a
start, not a finished head, for the other.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from mmtp.models.backbone import BackboneConfig
from mmtp.models.qwen3 import Qwen3Error, block_from_qwen3, block_to_qwen3, take

_AROUND = {
    "embedding_norm.weight": "enorm.weight",
    "state_norm.weight": "hnorm.weight",
    "project.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
}
_MODULE = re.compile(r"model\.layers\.(\d+)\.eh_proj\.weight")


def from_deepseek(state: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, Tensor]:
    """The state dict of a :class:`~mmtp.models.heads.sequential.SequentialHead` with as many modules as the checkpoint has.

    Copies of the embedding and the unembedding that it holds for each module are left out: ours are those of the model.

    Args:
        state: a checkpoint, or the part of it that lies behind the backbone's layers.
        config: of the backbone, whose depth is the number of the first module.

    Raises:
        Qwen3Error: there is no module behind the backbone, or its block is of another kind; names the first weight that is missing.
    """
    layers = sorted(int(found[1]) for name in state if (found := _MODULE.fullmatch(name)))
    if not layers or layers != list(range(config.depth, config.depth + len(layers))):
        raise Qwen3Error(f"modules are wanted from model.layers.{config.depth} on, behind {config.depth} layers; found {layers or 'none'}")
    out = {}
    for k, layer in enumerate(layers):
        theirs, ours = f"model.layers.{layer}", f"depths.{k}"
        out |= block_from_qwen3(state, config, theirs, f"{ours}.block")
        out |= {f"{ours}.{mine}": take(state, f"{theirs}.{name}") for mine, name in _AROUND.items()}
    return out


def to_deepseek(state: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, Tensor]:
    """The inverse of :func:`from_deepseek`, to be added to what :func:`~mmtp.models.qwen3.to_qwen3` gives.

    Copies of embedding and unembedding, which DeepSeek's own checkpoints hold per module, are left out: transformers takes the model's.

    Args:
        state: of a head of type ``sequential`` or ``shared``.
        config: of the backbone.
    """
    out = {}
    for k in range(sum(name.endswith(".project.weight") for name in state)):
        theirs, ours = f"model.layers.{config.depth + k}", f"depths.{k}"
        out |= block_to_qwen3(state, config, f"{ours}.block", theirs)
        out |= {f"{theirs}.{name}": state[f"{ours}.{mine}"] for mine, name in _AROUND.items()}
    return out
