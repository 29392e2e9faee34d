"""Input embeddings: one table for all ids, and a projection for continuous features where the model reads any."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmtp.types import Batch, MmtpError


class FeatureError(MmtpError):
    """Continuous features that do not fit the model or the batch."""


class Embedding(nn.Module):
    """Token embeddings, with continuous vectors put in at their placeholders.

    Args:
        vocab_size: rows of the table.
        width: of the residual stream.
        feature_width: width of continuous features; 0 where the model reads none.
    """

    def __init__(self, vocab_size: int, width: int, feature_width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, width)
        self.features = nn.Linear(feature_width, width) if feature_width else None

    def forward(self, tokens: Int[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
        return self.table(tokens)

    def batch(self, batch: Batch) -> Float[Tensor, "b s d"]:
        """Embeddings of a packed batch, features included.

        Raises:
            FeatureError: the model has no projection for them, or their width differs.
        """
        x = self.table(batch.tokens)
        if batch.features is None or batch.feature_index is None:
            return x
        if self.features is None:
            raise FeatureError("the batch holds continuous features, but the model's feature_width is 0")
        if batch.features.shape[-1] != self.features.in_features:
            raise FeatureError(
                f"continuous features are {batch.features.shape[-1]} wide, the model's feature_width is {self.features.in_features}"
            )
        flat = x.flatten(0, 1)
        return flat.index_copy(0, batch.feature_index, self.features(batch.features).to(x.dtype)).view_as(x)


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
