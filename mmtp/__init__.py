"""mmtp: any medium to tokens, one model over all of them, several future tokens per step, and back, exactly.

The map, from the top down (a module imports only from lines below its own):

    cli         one file per verb of the command line
    train eval  trainers and their losses; measurements and the report
    pipeline    text, picture, sound in and out: the only place where a tokenizer meets a model
    events      what a reply holds, as it comes: tokens to characters, rows of pictures, samples
    data decode sources, shards, loader; KV cache, sampling, speculative decoding
    tokenizers  media <-> local codes            models   backbone, heads, loss
    stream      vocabulary, grammar, packing     nn       layers without project nouns
    hub         folders: zoo, checkpoint, Hub id
    config      dataclass <-> JSON, TOML
    registry    name -> class
    types       Modality, Codes, Segment, Batch

Public names are resolved on first use, so that ``import mmtp`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmtp.hub import from_pretrained, push_to_hub, save_pretrained
    from mmtp.hub import from_pretrained as load
    from mmtp.pipeline import Pipeline
    from mmtp.registry import REGISTRY
    from mmtp.types import Batch, Codes, Latents, Modality, Segment, TokenizerSpec

__version__ = "0.1.0"

_PUBLIC = {
    "load": "mmtp.hub:from_pretrained",
    "from_pretrained": "mmtp.hub:from_pretrained",
    "save_pretrained": "mmtp.hub:save_pretrained",
    "push_to_hub": "mmtp.hub:push_to_hub",
    "Pipeline": "mmtp.pipeline:Pipeline",
    "REGISTRY": "mmtp.registry:REGISTRY",
    **{name: f"mmtp.types:{name}" for name in ("Batch", "Codes", "Latents", "Modality", "Segment", "TokenizerSpec")},
}

__all__ = [
    "REGISTRY",
    "Batch",
    "Codes",
    "Latents",
    "Modality",
    "Pipeline",
    "Segment",
    "TokenizerSpec",
    "from_pretrained",
    "load",
    "push_to_hub",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mmtp' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
