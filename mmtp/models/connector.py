"""From the latents of a continuous tokenizer to vectors of a model's width, one to one, merged, or as a fixed number."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

import mmtp.config
from mmtp.nn.attention import attend
from mmtp.nn.block import init_weights
from mmtp.nn.mlp import SwiGLU
from mmtp.nn.norm import RMSNorm
from mmtp.stream.template import feature_places
from mmtp.types import Latents, MmtpError

POSITION_PERIOD = 1000.0
"""Longest period of :func:`sinusoids` is 2 pi times as much: grids are some dozens of cells long."""


class ConnectorError(MmtpError):
    """Latents that a connector cannot take."""


class Connector(nn.Module, ABC):
    """What connectors share: ``Latents`` of one width to ``Latents`` of another. Padding never changes what comes out.

    Args:
        width: of the latents.
        out_width: of the model.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(mmtp.config.Config):
        """Configuration of any connector; ``build(width=…, out_width=…)`` makes it."""

        family: ClassVar[str] = "connector"

        def places(self, grid: Sequence[int]) -> tuple[int, ...]:
            """Grid of the vectors that come out for a grid of those that go in, without running the network: one to one."""
            return tuple(grid)

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.width, self.out_width = width, out_width

    def forward(self, latents: Latents) -> Latents:
        """Latents of the model's width, zero where an item has ended.

        Raises:
            ConnectorError: the latents are of another width, or have no places where places are needed.
        """
        if latents.values.shape[-1] != self.width:
            raise ConnectorError(f"latents are {latents.values.shape[-1]} wide, this connector reads {self.width}")
        # What stands in padding may be anything, and not a number times 0 is not a number.
        return self._connect(replace(latents, values=latents.values.masked_fill(~latents.mask[..., None], 0)))

    @abstractmethod
    def _connect(self, latents: Latents) -> Latents: ...


class Projector(Connector):
    """Every vector by itself through one linear layer, or through two with GELU between (LLaVA-1.5, arXiv 2310.03744, section 3.3).

    With ``merge`` 2, the vectors of 2 x 2 neighbouring cells are first joined into one of four times the width, so that a model reads a
    quarter of them (pixel shuffle, InternVL 1.5, arXiv 2404.16821, section 3.1; Qwen2-VL, arXiv 2409.12191, section 2.1). Where a grid is
    not a multiple, zeros stand for what lies beyond its edge.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """
        Attributes:
            layers: linear layers, 1 or 2.
            merge: cells per side that become one vector.
        """

        layers: int = 2
        merge: int = 1

        def __post_init__(self) -> None:
            if self.layers not in (1, 2):
                raise ValueError(f"layers {self.layers}: 1 or 2 are wanted")
            if self.merge < 1:
                raise ValueError(f"merge {self.merge}: at least 1 is wanted")

        def places(self, grid: Sequence[int]) -> tuple[int, ...]:
            return feature_places(grid, merge=self.merge)

    def __init__(self, config: Config, *, width: int, out_width: int) -> None:
        super().__init__(width, out_width)
        self.config = config
        first = nn.Linear(width * config.merge**2, out_width)
        self.layers = nn.Sequential(first, *([nn.GELU(), nn.Linear(out_width, out_width)] if config.layers == 2 else []))

    def _connect(self, latents: Latents) -> Latents:
        merged = latents if self.config.merge == 1 else merge_cells(latents, self.config.merge)
        values = self.layers(merged.values)
        return replace(merged, values=values.masked_fill(~merged.mask[..., None], 0))


class Resampler(Connector):
    """Any number of vectors to a fixed one: learned queries attend to them (Flamingo's Perceiver, arXiv 2204.14198, section 3.1).

    In every layer the queries read the latents and each other. Places are told by sinusoids of row and column added to the latents, so that
    their order does not matter but their places do, on grids of any size.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """
        Attributes:
            num_queries: vectors that come out. Flamingo has 64.
            depth: layers. Flamingo has 6.
            num_heads: heads of attention; divides the model's width.
            mlp_ratio: hidden width of the feed-forward layers, in widths of the model.
        """

        num_queries: int = 64
        depth: int = 6
        num_heads: int = 8
        mlp_ratio: float = 4.0

        def __post_init__(self) -> None:
            for name in ("num_queries", "depth", "num_heads"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} {getattr(self, name)}: at least 1 is wanted")

        def places(self, grid: Sequence[int]) -> tuple[int, ...]:
            return feature_places(grid, queries=self.num_queries)

    def __init__(self, config: Config, *, width: int, out_width: int) -> None:
        super().__init__(width, out_width)
        if out_width % config.num_heads or out_width % 4:
            raise ConnectorError(f"a width of {out_width}: a multiple of 4 and of num_heads {config.num_heads} is wanted")
        self.config = config
        self.inputs = nn.Linear(width, out_width)
        self.queries = nn.Parameter(torch.randn(config.num_queries, out_width) * 0.02)
        self.layers = nn.ModuleList(
            _ResamplerLayer(out_width, config.num_heads, int(out_width * config.mlp_ratio)) for _ in range(config.depth)
        )
        self.norm = RMSNorm(out_width)
        init_weights(self, config.depth)

    def _connect(self, latents: Latents) -> Latents:
        n, device = self.config.num_queries, latents.values.device
        inputs = self.inputs(latents.values) + sinusoids(latents.coordinates, self.out_width)
        mask = torch.cat([latents.mask, latents.mask.new_ones(len(latents), n)], 1)[:, None, None].expand(-1, -1, n, -1)
        x = self.queries.expand(len(latents), -1, -1)
        for layer in self.layers:
            x = layer(x, inputs, mask)
        places = torch.full((len(latents), n, latents.coordinates.shape[2]), -1, device=device)
        return Latents(self.norm(x), places, torch.full((len(latents),), n, device=device), latents.sizes)


class _ResamplerLayer(nn.Module):
    def __init__(self, width: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm, self.input_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width), RMSNorm(width)
        self.attention = _CrossAttention(width, num_heads)
        self.mlp = SwiGLU(width, mlp_width)

    def forward(self, x: Float[Tensor, "b m d"], inputs: Float[Tensor, "b n d"], mask: Tensor) -> Float[Tensor, "b m d"]:
        queries = self.norm(x)
        x = x + self.attention(queries, torch.cat([self.input_norm(inputs), queries], 1), mask)
        return x + self.mlp(self.mlp_norm(x))


class _CrossAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Float[Tensor, "b m d"], context: Float[Tensor, "b t d"], mask: Tensor) -> Float[Tensor, "b m d"]:
        q = rearrange(self.q(x), "b m (h hd) -> b h m hd", h=self.num_heads)
        k, v = rearrange(self.kv(context), "b t (two h hd) -> two b h t hd", two=2, h=self.num_heads)
        return self.out(rearrange(attend(q, k, v, mask), "b h m hd -> b m (h hd)"))


def merge_cells(latents: Latents, side: int) -> Latents:
    """The vectors of ``side`` x ``side`` neighbouring cells as one, row by row; zeros beyond the edge of the grid.

    Raises:
        ConnectorError: a vector has no place on a grid of rows and columns.
    """
    values, mask, places = latents.values, latents.mask, latents.coordinates
    if places.shape[2] != 2 or (places < 0).any():
        raise ConnectorError("latents without row and column (class token, registers) cannot be merged; leave them out")
    grid = torch.where(mask[..., None], places, 0).amax(1) // side + 1 if values.shape[1] else places.new_zeros(len(values), 2)
    lengths = torch.where(latents.lengths > 0, grid[:, 0] * grid[:, 1], 0)
    cells, within = places // side, places % side
    item, position = mask.nonzero(as_tuple=True)
    row, column = cells[item, position].unbind(-1)
    cell = row * grid[item, 1] + column
    down, across = within[item, position].unbind(-1)
    most = int(lengths.amax()) if len(lengths) else 0
    merged = values.new_zeros(len(values), most, side**2, values.shape[2])
    merged = merged.index_put((item, cell, down * side + across), values[item, position])
    coordinates = places.new_zeros(len(values), most, 2).index_put((item, cell), cells[item, position])
    return replace(latents, values=merged.flatten(2), coordinates=coordinates, lengths=lengths)


def sinusoids(coordinates: Int[Tensor, "b n axes"], width: int) -> Float[Tensor, "b n d"]:
    """Sines and cosines of every coordinate, an equal share of ``width`` for each axis (Vaswani et al. 2017, section 3.5)."""
    axes = coordinates.shape[2]
    steps = width // (2 * axes)
    frequencies = POSITION_PERIOD ** -(torch.arange(steps, device=coordinates.device) / steps)
    angles = coordinates[..., None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], -1).flatten(2)
    return torch.nn.functional.pad(waves, (0, width - waves.shape[2]))
