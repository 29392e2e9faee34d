"""One registry: family and name -> class, resolved only when asked for.

Configurations on disk hold registry names, never import paths, so that files survive a move of the code.
"""

import difflib
import importlib
from typing import Any

from mmtp.types import MmtpError


class UnknownNameError(MmtpError):
    """A name that no entry of the family bears."""


class Registry:
    """Names of every pluggable class, as ``"module:Class"`` strings that are imported on first use.

    A library of your own adds to it: ``REGISTRY.register("tokenizer", "mine", "my_package.codec:MyCodec")``.
    """

    def __init__(self, families: dict[str, dict[str, str]]) -> None:
        self._families = {family: dict(entries) for family, entries in families.items()}

    def register(self, family: str, name: str, target: str) -> None:
        """Adds or replaces an entry. ``target`` is ``"module:Class"``."""
        self._families.setdefault(family, {})[name] = target

    def names(self, family: str) -> list[str]:
        return sorted(self._families.get(family, {}))

    def resolve(self, family: str, name: str) -> Any:
        """Imports and returns the class.

        Raises:
            UnknownNameError: names the nearest entry.
        """
        entries = self._families.get(family, {})
        if name not in entries:
            near = difflib.get_close_matches(name, entries, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(entries)) or 'none'}"
            raise UnknownNameError(f"no {family} is called {name!r}; {hint}")
        module, _, attribute = entries[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def name_of(self, cls: type) -> tuple[str, str]:
        """Family and name under which a class is registered."""
        target = f"{cls.__module__}:{cls.__qualname__}"
        for family, entries in self._families.items():
            for name, entry in entries.items():
                if entry == target:
                    return family, name
        raise UnknownNameError(f"{target} is not registered; call REGISTRY.register(family, name, {target!r})")


REGISTRY = Registry(
    {
        "tokenizer": {
            "audio-conv": "mmtp.tokenizers.audio.conv:ConvAudioTokenizer",
            "audio-frame": "mmtp.tokenizers.audio.frame:FrameAudioTokenizer",
            "audio-patches": "mmtp.tokenizers.continuous.patches:PatchAudioTokenizer",
            "autoencoder-dc": "mmtp.tokenizers.pretrained.latents:AutoencoderDC",
            "autoencoder-kl": "mmtp.tokenizers.pretrained.latents:AutoencoderKL",
            "chameleon-vq": "mmtp.tokenizers.pretrained.pictures:ChameleonVQ",
            "dac": "mmtp.tokenizers.pretrained.codecs:Dac",
            "diffusers-vq": "mmtp.tokenizers.pretrained.pictures:DiffusersVQ",
            "emu3-vq": "mmtp.tokenizers.pretrained.pictures:Emu3VQ",
            "encodec": "mmtp.tokenizers.pretrained.codecs:Encodec",
            "image-1d": "mmtp.tokenizers.image.one_d:OneDImageTokenizer",
            "image-conv": "mmtp.tokenizers.image.conv:ConvImageTokenizer",
            "image-patches": "mmtp.tokenizers.continuous.patches:PatchImageTokenizer",
            "image-vit": "mmtp.tokenizers.image.vit:ViTImageTokenizer",
            "janus-vq": "mmtp.tokenizers.pretrained.pictures:JanusVQ",
            "mimi": "mmtp.tokenizers.pretrained.codecs:Mimi",
            "text": "mmtp.tokenizers.text:TextTokenizer",
            "timm-vit": "mmtp.tokenizers.continuous.vit:TimmViT",
            "video-conv": "mmtp.tokenizers.video.conv:ConvVideoTokenizer",
            "vidtok": "mmtp.tokenizers.pretrained.videos:VidTok",
        },
        "quantizer": {
            "bsq": "mmtp.tokenizers.quantizers.binary:BSQ",
            "fsq": "mmtp.tokenizers.quantizers.scalar:FSQ",
            "ibq": "mmtp.tokenizers.quantizers.vector:IBQ",
            "lfq": "mmtp.tokenizers.quantizers.binary:LFQ",
            "multi-scale-vq": "mmtp.tokenizers.quantizers.multi_scale:MultiScaleVQ",
            "residual-fsq": "mmtp.tokenizers.quantizers.residual:ResidualFSQ",
            "residual-lfq": "mmtp.tokenizers.quantizers.residual:ResidualLFQ",
            "residual-vq": "mmtp.tokenizers.quantizers.residual:ResidualVQ",
            "sim-vq": "mmtp.tokenizers.quantizers.vector:SimVQ",
            "vq": "mmtp.tokenizers.quantizers.vector:VQ",
        },
        "head": {
            "depth": "mmtp.models.heads.depth:DepthHead",
            "next": "mmtp.models.heads.next:NextHead",
            "parallel": "mmtp.models.heads.parallel:ParallelHead",
            "sequential": "mmtp.models.heads.sequential:SequentialHead",
            "shared": "mmtp.models.heads.shared:SharedHead",
            "synchronized": "mmtp.models.heads.synchronized:SynchronizedHead",
        },
        "flow": {
            "block": "mmtp.models.heads.flow:BlockFlow",
            "token": "mmtp.models.heads.flow:TokenFlow",
        },
        "connector": {
            "projector": "mmtp.models.connector:Projector",
            "resampler": "mmtp.models.connector:Resampler",
        },
        "model": {
            "two-towers": "mmtp.models.two_towers:TwoTowers",
            "unified": "mmtp.models.unified:UnifiedModel",
        },
    }
)
