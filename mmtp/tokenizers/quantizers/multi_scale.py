"""Multi-scale residual quantization: a picture as a pyramid of grids of codes, from one code for all of it to one for every latent."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize as _VectorQuantize

from mmtp.nn.pyramid import averaged, enlarged, scale_ends
from mmtp.tokenizers.quantizers.base import LibraryQuantizer, QuantizerConfig
from mmtp.tokenizers.quantizers.vector import codebook_of, replace_dead_codes, start_in_training
from mmtp.types import MmtpError


class ScalesError(MmtpError):
    """Latents or codes that are not those of the pyramid's grids."""


class MultiScaleVQ(LibraryQuantizer):
    """Residual quantization over a pyramid of square grids with one codebook (VAR, Tian et al., arXiv 2404.02905, algorithms 1 and 2).

    Every scale codes what those before it have left over: the rest is averaged down to the scale's grid, each of its cells gets a code, and
    their entries are enlarged (bicubic) to the grid of latents and smoothed by a convolution. The codes are one row, scale by scale, each
    scale row by row: ``[b, sum(s * s), 1]`` for latents ``[b, s_last * s_last, d]``. Those of the first few scales are a coarser picture.

    The library's ``HierarchicalVQ`` is of this kind but has no way back from the first few scales, and moves its codebook once per scale,
    so that the coarsest, with one vector per picture, counts as much as the finest. Here the codebook moves once per step, on the vectors
    of all scales, and starts (k-means) from those that a pyramid without quantization would leave over.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(QuantizerConfig):
        """``scales``: cells per side of every grid, coarse to fine; the last is that of the latents.

        Attributes:
            scales: as above.
            codebook_size: entries of the codebook that all scales share.
            codebook_dim: numbers of an entry; latents are projected to them once, and back.
            convolutions: how many there are to smooth with; neighbouring scales share one where these are fewer than the scales.
            decay: as for VQ.
            dead_code_share: as for VQ.
            commitment: weight of the loss that draws latents to what the codes of the first scales, up to each, give.
        """

        scales: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
        codebook_size: int = 4096
        codebook_dim: int = 32
        convolutions: int = 4
        decay: float = 0.99
        dead_code_share: float = 0.2
        commitment: float = 0.25

        def __post_init__(self) -> None:
            if not self.scales or self.scales[0] < 1 or any(b <= a for a, b in pairwise(self.scales)):
                raise ValueError(f"scales {list(self.scales)}: numbers of cells per side are wanted, each more than the one before")
            if not 1 <= self.convolutions <= len(self.scales):
                raise ValueError(f"convolutions {self.convolutions}: 1 to {len(self.scales)} are wanted, at most one per scale")

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.config = config
        self.scales = config.scales
        self.codebook_sizes = (config.codebook_size,)
        self.project_in = nn.Linear(dim, config.codebook_dim)
        self.project_out = nn.Linear(config.codebook_dim, dim)
        self.vq = start_in_training(
            _VectorQuantize(
                dim=config.codebook_dim,
                codebook_size=config.codebook_size,
                kmeans_init=True,
                decay=config.decay,
                threshold_ema_dead_code=int(config.dead_code_share > 0),
            )
        )
        self.smooth = nn.ModuleList(nn.Conv2d(config.codebook_dim, config.codebook_dim, 3, padding=1) for _ in range(config.convolutions))

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        side = self.scales[-1]
        if latents.shape[1] != side * side:
            raise ScalesError(f"{latents.shape[1]} latents given, a grid of {side}x{side} is wanted")
        wanted = rearrange(self.project_in(latents), "b (h w) d -> b d h w", h=side)
        if self.training:
            self._start(wanted.detach())
        given, rest = torch.zeros_like(wanted), wanted.detach()
        ids, seen, loss = [], [], latents.new_zeros(())
        for i, scale in enumerate(self.scales):
            cells = averaged(rest, scale)
            codes = self.vq(cells, freeze_codebook=True)[1]
            part = self._enlarged(self.vq.get_codes_from_indices(codes), i)
            given, rest = given + part, rest - part.detach()
            ids.append(codes)
            seen.append(cells)
            if self.training:
                loss = loss + F.mse_loss(given, wanted.detach()) + self.config.commitment * F.mse_loss(given.detach(), wanted)
        row = torch.cat(ids, 1)
        if self.training:
            replace_dead_codes(self.vq, self.config.dead_code_share, row.numel())
            self.vq.update_indices(torch.cat(seen, 1), row)
            given = wanted + (given - wanted).detach()
        return self._projected(given), row[..., None], loss / len(self.scales)

    def _lookup(self, ids: Tensor) -> Tensor:
        side = self.scales[-1]
        given = torch.zeros(len(ids), self.config.codebook_dim, side, side, device=ids.device)
        for i, codes in enumerate(self._split(ids[..., 0])):
            given = given + self._enlarged(self.vq.get_codes_from_indices(codes), i)
        return self._projected(given)

    def _split(self, row: Int[Tensor, "b n"]) -> Iterator[Int[Tensor, "b _"]]:
        """The codes of every scale that there are codes of."""
        ends = scale_ends(self.scales)
        if row.shape[1] not in ends:
            raise ScalesError(f"{row.shape[1]} codes given; the first scales have {', '.join(map(str, ends))}")
        kept = self.scales[: ends.index(row.shape[1]) + 1]
        yield from row.split([scale * scale for scale in kept], 1)

    def _enlarged(self, entries: Float[Tensor, "b n d"], i: int) -> Float[Tensor, "b d h w"]:
        """What entries of a scale add to the latents."""
        return enlarged(entries, i, self.scales, self.smooth)

    def _projected(self, given: Float[Tensor, "b d h w"]) -> Float[Tensor, "b n d2"]:
        return self.project_out(rearrange(given, "b d h w -> b (h w) d"))

    @torch.no_grad()
    def _start(self, rest: Float[Tensor, "b d h w"]) -> None:
        """Starts the codebook, unless it has been, from the cells of all scales as they would be if each were coded without loss."""
        if codebook_of(self.vq).initted:
            return
        seen = []
        for i, scale in enumerate(self.scales):
            seen.append(averaged(rest, scale))
            rest = rest - self._enlarged(seen[-1], i)
        codebook_of(self.vq).init_embed_(torch.cat(seen, 1).flatten(0, 1)[None])
