"""Losses by contrast: a picture and its caption lie nearer than a picture and another's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmtp.config import Config
from mmtp.models.two_towers import TwoTowers


def clip_loss(logits: Float[Tensor, "b b"], same: Bool[Tensor, "b b"]) -> Float[Tensor, ""]:
    """Symmetric InfoNCE: cross-entropy over the captions of a batch for every picture, and over its pictures for every caption.

    CLIP (Radford et al. 2021, arXiv 2103.00020, figure 3). Where captions of a batch are equal, every picture that bears one is its
    picture, and the target is spread evenly (UniCL, Yang et al. 2022, arXiv 2204.03610, section 3.2).

    Args:
        logits: similarity times temperature; pictures in rows, captions in columns.
        same: True where picture and caption belong together; the diagonal at least.
    """
    target = same.float()
    rows = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    columns = F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (rows + columns) / 2


def siglip_loss(logits: Float[Tensor, "b b"], same: Bool[Tensor, "b b"]) -> Float[Tensor, ""]:
    """Every pair by itself: does this caption belong to this picture? Summed over captions, mean over pictures.

    SigLIP (Zhai et al. 2023, arXiv 2303.15343, section 3.2). Equal captions count as belonging.

    Args:
        logits: similarity times scale plus bias; pictures in rows, captions in columns.
        same: True where picture and caption belong together.
    """
    signs = same.to(logits.dtype) * 2 - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


@dataclass(frozen=True, kw_only=True)
class ContrastConfig(Config):
    """``[loss.contrast]``: a text tower that is trained along, and by which loss.

    Attributes:
        loss: ``clip`` starts at a scale of 1/0.07 without bias, ``siglip`` at 10 with a bias of -10, as their papers do. Both learn
            the scale, which stays at most 100; ``siglip`` learns the bias too.
        text: tokenizer of the captions, a zoo entry or folder.
        width: of the text tower.
        depth: its blocks.
        dim: of the space in which pictures and captions meet.
        length: most tokens of a caption; the rest is cut off.
        weight: of the whole term.
    """

    loss: Literal["clip", "siglip"] = "siglip"
    text: str = "text-bpe-4k"
    width: int = 128
    depth: int = 4
    dim: int = 128
    length: int = 32
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight {self.weight:g}: above 0 is wanted")

    def towers(self, picture_width: int) -> TwoTowers:
        """The towers for a student of this width, with new weights."""
        return TwoTowers.Config(
            text=self.text, picture_width=picture_width, width=self.width, depth=self.depth, dim=self.dim, length=self.length
        ).build()


class Contrast(nn.Module):
    """The loss with its towers, learned scale and bias.

    Args:
        config: which loss.
        towers: what brings pictures and captions into one space.
    """

    def __init__(self, config: ContrastConfig, towers: TwoTowers) -> None:
        super().__init__()
        self.config, self.towers = config, towers
        clip = config.loss == "clip"
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07 if clip else 10.0)))
        self.bias = nn.Parameter(torch.tensor(0.0 if clip else -10.0), requires_grad=not clip)

    def forward(self, values: Float[Tensor, "b n d"], captions: Sequence[str]) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The loss of a batch, and numbers for the log; pictures of which nothing is said do not take part.

        Args:
            values: the student's features.
            captions: what is said of each picture; empty where that is nothing.
        """
        said = [i for i, caption in enumerate(captions) if caption]
        if not said:
            return values.sum() * 0, {}
        texts = [captions[i] for i in said]
        pictures = self.towers.embed_features(values[said])
        words = self.towers.embed_texts(texts)
        scale = self.log_scale.clamp(max=math.log(100)).exp()
        logits = scale * pictures.float() @ words.float().T + self.bias
        numbers = {text: i for i, text in enumerate(texts)}
        ids = torch.tensor([numbers[text] for text in texts], device=logits.device)
        same = ids[:, None] == ids[None, :]
        loss = clip_loss(logits, same) if self.config.loss == "clip" else siglip_loss(logits, same)
        right = same.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        return loss, {"contrast": loss.item(), "contrast.accuracy": right.item(), "contrast.scale": scale.item()}
