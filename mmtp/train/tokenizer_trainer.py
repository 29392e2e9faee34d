"""Training of picture tokenizers: reconstruct pictures through the quantizer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmtp.config import build_config, from_dict
from mmtp.hub import save_pretrained
from mmtp.train.losses.reconstruction import ReconstructionConfig, reconstruction_loss
from mmtp.train.pictures import PictureData, PictureMix
from mmtp.train.recipe import Recipe
from mmtp.train.trainer import Trainer

PREVIEWS = 16


@dataclass
class TokenizerTask:
    """Reconstruction of batches of a picture mix.

    Attributes:
        module: a picture tokenizer whose ``forward`` gives (reconstruction, Quantized).
        data: where the batches come from.
        size: pictures per batch.
        loss_config: weights of the terms.
    """

    module: nn.Module
    data: PictureMix
    size: int
    loss_config: ReconstructionConfig = field(default_factory=ReconstructionConfig)

    def batch(self, step: int) -> Float[Tensor, "b 3 h w"]:
        return self.data.batch(step, self.size)

    def loss(self, batch: Float[Tensor, "b 3 h w"], step: int) -> tuple[Float[Tensor, ""], dict[str, float]]:
        output, quantized = self.module(batch)
        loss, metrics = reconstruction_loss(output, batch, self.loss_config)
        usage = len(quantized.ids.unique()) / quantized.ids.numel()
        return loss + self.loss_config.quantizer * quantized.loss, metrics | {"distinct_codes": usage, "samples": len(batch)}

    def preview(self, module: nn.Module, folder: Path, step: int) -> None:
        from mmtp.data.media import contact_sheet, encode_png

        batch = self.data.batch(0, PREVIEWS)
        pairs = torch.stack([batch, module(batch)[0]], 1).flatten(0, 1).add(1).div(2)
        (folder / f"step-{step:06d}.png").write_bytes(encode_png(contact_sheet(list(pairs.clamp(0, 1)), columns=8)))


def train_tokenizer(recipe: Recipe, folder: Path, *, data_root: Path, progress: bool = True) -> Path:
    """Trains a picture tokenizer and saves it in ``folder/result``.

    Args:
        recipe: ``[tokenizer]`` is the configuration, ``[data]`` a :class:`PictureData`, ``[loss]`` a :class:`ReconstructionConfig`.
        folder: the run's folder.
        data_root: where relative paths of the sources start.
        progress: whether to show bars.
    """
    data = from_dict(PictureData, recipe.data, "data")
    loss = from_dict(ReconstructionConfig, recipe.loss, "loss")
    config: Any = build_config("tokenizer", recipe.tokenizer, "tokenizer")
    torch.manual_seed(recipe.run.seed)
    task = TokenizerTask(config.build(), PictureMix(data, data_root, recipe.run.seed, progress=progress), recipe.run.batch, loss)
    result: Any = Trainer(task, recipe.optim, recipe.run, folder, progress=progress).fit()
    return save_pretrained(result, folder / "result")
