"""Input embeddings: one table for all ids, and a connector for continuous features where the model reads any."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmtp.models.connector import Connector
from mmtp.types import Batch, Latents, MmtpError, grid_coordinates


class FeatureError(MmtpError):
    """Continuous features that do not fit the model or the batch."""


class Embedding(nn.Module):
    """Token embeddings, with continuous vectors put in at their placeholders.

    Args:
        vocab_size: rows of the table.
        width: of the residual stream.
        feature_width: width of continuous features; 0 where the model reads none.
        connector: how these become vectors of the model's width.
    """

    def __init__(self, vocab_size: int, width: int, feature_width: int, connector: Connector.Config) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, width)
        self.features: Connector | None = connector.build(width=feature_width, out_width=width) if feature_width else None
        self.register_load_state_dict_pre_hook(_as_projector)

    def forward(self, tokens: Int[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
        return self.table(tokens)

    def batch(self, batch: Batch) -> Float[Tensor, "b s d"]:
        """Embeddings of a packed batch, features included.

        Raises:
            FeatureError: the model has no connector for them, their width differs, or the stream has other places for them.
        """
        return self.place(batch, self.table(batch.tokens))

    def place(self, batch: Batch, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """The same with the features of a batch at their places.

        Raises:
            FeatureError: see :meth:`batch`.
        """
        if batch.features is None or batch.feature_index is None:
            # Among several processes each must have a gradient of every weight, also of those that its rows have no use for.
            return x if self.features is None else x + 0 * sum(weight.sum() for weight in self.features.parameters())
        vectors = self.connect(batch.features, batch.feature_grids)
        if len(vectors) != len(batch.feature_index):
            raise FeatureError(
                f"the streams have {len(batch.feature_index)} places for {len(batch.features)} continuous features, the model's connector "
                f"makes {len(vectors)} of them; tokenize with the connector's --merge or --queries"
            )
        return x.flatten(0, 1).index_copy(0, batch.feature_index, vectors.to(x.dtype)).view_as(x)

    def connect(self, features: Float[Tensor, "n c"], grids: Int[Tensor, "spans axes"] | None = None) -> Float[Tensor, "m d"]:
        """What stands in the stream for the features of some spans, one behind the other.

        Args:
            features: vectors of all spans.
            grids: of every span's vectors; None: one column of them all.

        Raises:
            FeatureError: the model has no connector for them, or their width differs.
        """
        if self.features is None:
            raise FeatureError("the batch holds continuous features, but the model's feature_width is 0")
        if features.shape[-1] != self.features.width:
            raise FeatureError(f"continuous features are {features.shape[-1]} wide, the model's feature_width is {self.features.width}")
        spans = [[len(features), 1]] if grids is None else grids.tolist()
        features = features.to(self.table.weight.dtype)
        places = [grid_coordinates(grid).to(features.device) for grid in spans]
        read = self.features(Latents.pad(features.split([len(p) for p in places]), places))
        return read.values[read.mask]


def _as_projector(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Models of before had one linear layer, called ``features``."""
    for name in ("weight", "bias"):
        if f"{prefix}features.{name}" in state:
            state[f"{prefix}features.layers.0.{name}"] = state.pop(f"{prefix}features.{name}")


NEW_ROWS_SPREAD = 0.3
"""Of rows that join a table, beside those it has. All of it would make a trained unembedding sure of new tokens at random; none, and no
input would tell them apart."""


def start_rows(table: Float[Tensor, "v d"], new: Bool[Tensor, " v"]) -> None:
    """Lets rows that join a table begin at the mean of those it has, with noise (Hewitt 2021, "Initializing new word embeddings for
    pretrained language models").

    Args:
        table: embeddings or unembeddings; changed in place.
        new: which rows join.
    """
    known = table[~new]
    table[new] = known.mean(0) + NEW_ROWS_SPREAD * known.std(0) * torch.randn(int(new.sum()), table.shape[1], device=table.device)


KERNEL_WIDTH = 0.7
"""Of :func:`codebook_embeddings`, where two random vectors of the codebook are sqrt(2) apart on average."""


def codebook_embeddings(vectors: Float[Tensor, "n c"], width: int, std: float = 0.02) -> Float[Tensor, "n d"]:
    """First embeddings of codes, near where the tokenizer's vectors are near.

    A picture vocabulary has thousands of codes, and many differ by a shade. Starting from random rows, a model must learn each
    from its own few occurrences; starting from random Fourier features of the codebook (Rahimi and Recht 2007, section 3.1), what
    it learns of one code holds for its neighbours. A share of independent noise keeps neighbours apart.

    Args:
        vectors: one per code.
        width: of the embedding.
        std: of its entries.
    """
    z = vectors - vectors.mean(0)
    z = z / z.square().sum(1).mean().sqrt().clamp(min=1e-12)
    directions = torch.randn(z.shape[1], width, device=z.device) / KERNEL_WIDTH
    phases = torch.rand(width, device=z.device) * 2 * math.pi
    features = math.sqrt(2) * (z @ directions + phases).cos()
    return std * (0.9 * features + math.sqrt(1 - 0.9**2) * torch.randn_like(features))
