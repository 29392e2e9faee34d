"""Next-scale prediction: pictures that are a pyramid of grids are written grid by grid (VAR, Tian et al., arXiv 2404.02905, section 3.2).

A code of such a picture is not predicted from the code before it. It is asked for: beside the stream stand *queries*, one for each code
of a scale. What a query holds is all that the scales before it have said of its cell, which is their sum, averaged to the scale's grid,
and where the cell is. It sees the stream before its scale, and the other queries of the scale; nothing of the stream sees a query. So the
codes of a scale are predicted in one pass, from the scales and the words before them alone; and a code in the stream is a token like any
other, for words behind the picture as for later scales, whether the model wrote it or was given it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import mmtp.config
from mmtp.nn.pyramid import averaged, enlarged, scale_ends
from mmtp.stream.grammar import GrammarState
from mmtp.stream.vocab import VocabLayout
from mmtp.types import Batch, Modality

WIDTH_MULTIPLE = 64
"""Rows have room for a multiple of so many queries, so that batches differ in few shapes."""


@dataclass(frozen=True, kw_only=True)
class NextScaleConfig(mmtp.config.Config):
    """What a model knows of the pyramid; it is its tokenizer's.

    Attributes:
        scales: cells per side of every grid, coarse to fine.
        codebook_dim: numbers of a codebook entry.
        convolutions: with which what a scale adds is smoothed; neighbouring scales share one where they are fewer.
    """

    scales: tuple[int, ...]
    codebook_dim: int
    convolutions: int

    def __post_init__(self) -> None:
        if not self.scales or self.scales[0] < 1 or any(b <= a for a, b in pairwise(self.scales)):
            raise ValueError(f"scales {list(self.scales)}: numbers of cells per side are wanted, each more than the one before")


class NextScale(nn.Module):
    """Makes the queries of a scale from the codes of those before it.

    The tokenizer's codebook and convolutions are buffers: they are kept with the model and never trained.

    Args:
        config: sizes.
        layout: the vocabulary.
        width: of the model.

    Attributes:
        slot: of the grammar, in which codes of pictures stand.

    Raises:
        ConfigError: the vocabulary has no codes of pictures, or several codebooks of them.
    """

    codebook: Tensor
    kernels: Tensor
    biases: Tensor

    def __init__(self, config: NextScaleConfig, layout: VocabLayout, width: int) -> None:
        super().__init__()
        entry = next((entry for entry in layout.media if entry.modality is Modality.IMAGE and not entry.continuous), None)
        if entry is None or len(entry.codebook_sizes) != 1:
            have = "no codes of pictures" if entry is None else f"{len(entry.codebook_sizes)} codebooks of pictures"
            raise mmtp.config.ConfigError(f"next_scale: a pyramid of pictures has one codebook, and the vocabulary has {have}")
        dim = config.codebook_dim
        self.scales, self.ends = config.scales, scale_ends(config.scales)
        self.starts = (0, *self.ends[:-1])
        self.slot = layout.slot_index[f"{Modality.IMAGE}.codes.0"]
        self._one_row = layout.dim(1)
        self.first_id, end = layout.code_range(Modality.IMAGE)
        self.register_buffer("codebook", torch.zeros(end - self.first_id, dim))
        self.register_buffer("kernels", torch.zeros(config.convolutions, dim, dim, 3, 3))
        self.register_buffer("biases", torch.zeros(config.convolutions, dim))
        self.project = nn.Linear(dim, width)
        self.cells = nn.Embedding(self.ends[-1], width)
        self.levels = nn.Embedding(len(self.scales), width)

    @torch.no_grad()
    def take(self, codebook: Float[Tensor, "n c"], convolutions: Iterable[nn.Conv2d]) -> None:
        """Takes over what the tokenizer has learnt."""
        self.codebook.copy_(codebook)
        self.kernels.copy_(torch.stack([layer.weight for layer in convolutions]))
        self.biases.copy_(torch.stack([layer.bias for layer in convolutions if layer.bias is not None]))

    def coarser(self, codes: Int[Tensor, "b n"]) -> Iterator[Float[Tensor, "b _ c"]]:
        """What is said of the cells of every scale before it is written: of the first nothing, and last of the scale behind the codes.

        Args:
            codes: local ids of the first few scales, or of none; the last scale's are of no use.
        """
        with torch.autocast(codes.device.type, enabled=False):
            smooth = [partial(F.conv2d, weight=k, bias=b, padding=1) for k, b in zip(self.kernels, self.biases, strict=True)]
            given = self.codebook.new_zeros(len(codes), self.codebook.shape[1], self.scales[-1], self.scales[-1])
            for i, (side, start, end) in enumerate(zip(self.scales, self.starts, self.ends, strict=True)):
                yield averaged(given, side)
                if end > codes.shape[1]:
                    return
                given = given + enlarged(F.embedding(codes[:, start:end], self.codebook), i, self.scales, smooth)

    def forward(self, codes: Int[Tensor, "b n"]) -> Float[Tensor, "b m d"]:
        """Queries of all scales up to the one behind the codes."""
        said = torch.cat(list(self.coarser(codes)), 1)
        levels = torch.cat([level.expand(side * side, -1) for level, side in zip(self.levels.weight, self.scales, strict=True)])
        return self.project(said) + (self.cells.weight + levels)[: said.shape[1]]

    def due(self, state: GrammarState) -> int | None:
        """Which scale comes next in a stream, or goes on there; None where something else comes, or codes of a grid that is no pyramid's:
        these are written one by one.
        """
        if state.slot != self.slot or state.grid[0] != 1 or state.grid[1] not in self.ends:
            return None
        return next(i for i, end in enumerate(self.ends) if state.coordinate[2] < end)

    def queries(self, batch: Batch, predicted: Bool[Tensor, "b s"]) -> "Queries | None":
        """Queries of all codes of a batch that are predicted; None where there are none.

        Args:
            batch: packed rows.
            predicted: which places are; of a picture all or none.
        """
        rows, length = batch.tokens.shape
        device = batch.tokens.device
        inside = batch.slots == self.slot
        begins = (inside & ~F.pad(inside, (1, 0))[:, :-1]).flatten()
        sizes = torch.bincount(begins.cumsum(0)[inside.flatten()] - 1)
        flat = batch.tokens.flatten()
        begin = begins.nonzero()[:, 0]
        pyramid = torch.isin(sizes, torch.tensor(self.ends, device=device)) & (flat[begin - 2] == self._one_row)
        chosen = pyramid & predicted.flatten()[begin]
        begin, sizes = begin[chosen], sizes[chosen]
        if not len(begin):
            return None
        cell = torch.arange(self.ends[-1], device=device)
        exists = cell < sizes[:, None]
        place = (begin[:, None] + cell).where(exists, begin[:, None])
        embedded = self((flat[place] - self.first_id)[:, : self.starts[-1]])[exists]
        level = torch.repeat_interleave(torch.tensor([side * side for side in self.scales], device=device))
        until = begin[:, None] % length + torch.tensor(self.starts, device=device)[level] - 1
        block = len(self.scales) * torch.arange(len(begin), device=device)[:, None] + level
        place = place[exists]
        row = place // length
        counts = torch.bincount(row, minlength=rows)
        width = -(-int(counts.max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        column = torch.arange(len(row), device=device) - (counts.cumsum(0) - counts)[row]

        def put(default: Tensor, values: Tensor) -> Tensor:
            return default.index_put((row, column), values)

        nowhere = torch.full((rows, width), -1, device=device)
        own = length + torch.arange(width, device=device).expand(rows, width)
        return Queries(
            embedded=put(embedded.new_zeros(rows, width, embedded.shape[1]), embedded),
            positions=put(batch.positions.new_zeros(rows, width, 3), batch.positions.flatten(0, 1)[place]),
            document_ids=put(nowhere, batch.document_ids.flatten()[place]),
            blocks=put(nowhere, block[exists] + length),
            until=put(own, until[exists]),
            at=row * (length + width) + length + column,
            before=place - 1,
        )

    def idle(self) -> Float[Tensor, ""]:
        """Zero, with a gradient of every weight: among several processes each must have one, also where its rows have no queries."""
        return 0 * sum((weight.sum() for weight in self.parameters()), self.codebook.new_zeros(()))


@dataclass(frozen=True)
class Queries:
    """Queries that stand behind the rows of a batch.

    Attributes:
        embedded: what they hold; zeros on padding.
        positions: those of the codes that they ask for.
        document_ids: likewise; -1 on padding.
        blocks: number of the scale; queries of one see each other. Beyond the numbers of spans in the stream.
        until: the last place of the row that a query sees.
        at: flat index of every query in rows that are so much longer.
        before: flat index of the place before its code, in rows as they were.
    """

    embedded: Float[Tensor, "b q d"]
    positions: Int[Tensor, "b q 3"]
    document_ids: Int[Tensor, "b q"]
    blocks: Int[Tensor, "b q"]
    until: Int[Tensor, "b q"]
    at: Int[Tensor, " n"]
    before: Int[Tensor, " n"]

    def appended(
        self, batch: Batch, x: Float[Tensor, "b s d"], spans: Int[Tensor, "b s"] | None
    ) -> tuple[Float[Tensor, "b t d"], Int[Tensor, "b t 3"], Int[Tensor, "b t"], Int[Tensor, "b t"], Int[Tensor, "b t"]]:
        """Rows with queries behind them: embeddings, positions, and what :func:`mmtp.nn.attention.document_mask` takes.

        Args:
            batch: the rows.
            x: their embeddings.
            spans: numbers of their bidirectional spans.
        """
        places = torch.arange(x.shape[1], device=x.device).expand_as(batch.document_ids)
        return (
            torch.cat([x, self.embedded.to(x.dtype)], 1),
            torch.cat([batch.positions, self.positions], 1),
            torch.cat([batch.document_ids, self.document_ids], 1),
            torch.cat([torch.full_like(places, -1) if spans is None else spans, self.blocks], 1),
            torch.cat([places, self.until], 1),
        )

    def predict(self, states: Float[Tensor, "b t d"]) -> Float[Tensor, "b s d"]:
        """States of the rows, in which those of queries stand where the next token is predicted that they ask for."""
        length = states.shape[1] - self.embedded.shape[1]
        rows = states[:, :length]
        # Not as a view of flat rows: those who divide a model warn of views that it gives, which might be changed in place.
        return rows.index_put((self.before // length, self.before % length), states.flatten(0, 1)[self.at])
