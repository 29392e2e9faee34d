"""What every head promises.

The backbone's own state at position t predicts x[t+1]. A head adds states for offsets k = 1..D: state k at t predicts
x[t+1+k] and depends on x[<=t+k] only. Heads differ by class, not by flag; all share the model's unembedding, and the grammar says
which of its columns are legal at the position that is predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmtp.config import Config
from mmtp.models.backbone import BackboneConfig
from mmtp.nn.attention import LayerCache, gather

BELOW = -1
"""Stands among offsets for the prediction of the row below: from a code, that of the same column and codebook one row further down."""

FORCED = 0
"""Stands among offsets for drafts that no head made: tokens about which grammar or a constraint leave no choice."""

CARRIED = -2
"""Stands among offsets for drafts that the model itself chose behind one that was refused."""

NEARBY = -3
"""Stands among offsets for drafts by what the model predicted at the nearest place that it has read up to."""


def offset_name(offset: int) -> str:
    """An offset in words: ``+2``, ``below``, ``forced``, ``carried``, ``nearby``."""
    return {BELOW: "below", FORCED: "forced", CARRIED: "carried", NEARBY: "nearby"}.get(offset, f"+{offset}")


class HeadConfig(Config):
    """Base of the heads' configurations, so that a model's configuration can hold any of them.

    A head is built from it with ``backbone``, the sizes of the decoder, and ``modalities``, the media of the vocabulary.
    """

    family: ClassVar[str] = "head"


@dataclass(frozen=True, kw_only=True)
class DraftConfig(HeadConfig):
    """What the configurations of all heads that draft have.

    Attributes:
        mtp_depth: D, tokens predicted beyond the next one.
        continuous: what the head reads where the stream has a vector in place of a token: ``placeholder``, the embedding of ``<feature>``
            at all of them, which training learns where the embedding is trained (GLM-5V-Turbo, arXiv 2604.26752, section 2.2); or, to
            measure what that brings, ``embeddings``, the vectors as the backbone reads them, or ``masked``, the placeholder where no
            position looks at another one's.
    """

    mtp_depth: int = 4
    continuous: Literal["placeholder", "embeddings", "masked"] = "placeholder"

    def __post_init__(self) -> None:
        if self.mtp_depth < 1:
            raise ValueError(f"mtp_depth {self.mtp_depth} is below 1; for no drafts use head type 'next'")


@dataclass(frozen=True, kw_only=True)
class BlockConfig(DraftConfig):
    """What the configurations of all heads that are made of the backbone's blocks have.

    Attributes:
        mlp_width: of the blocks' feed-forward part; 0 takes the backbone's. One shared block may so have the parameters of several.
    """

    mlp_width: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp_width < 0:
            raise ValueError(f"mlp_width {self.mlp_width} is below 0; 0 takes the backbone's")

    def sizes(self, backbone: BackboneConfig) -> BackboneConfig:
        """Those of the head's blocks."""
        return replace(backbone, mlp_width=self.mlp_width or backbone.mlp_width)


@dataclass(frozen=True)
class Places:
    """Where the anchors t of a pass stand, and what the grammar knows of the tokens that offset k reads and predicts there.

    Attributes:
        positions: rotary positions of x[t+k].
        modality: ``Modality.index`` of x[t+k+1]. The grammar knows it from x[<=t+k].
        banks: ``Modality.index`` of every position that may be looked at.
        mask: True where an anchor may look.
        newest: index of each row's newest anchor, where states are wanted of it alone: a head may leave what it gives for others undone.
            None wants all.
    """

    positions: Int[Tensor, "b s 3"]
    modality: Int[Tensor, "b s"]
    banks: Int[Tensor, "b t"]
    mask: Bool[Tensor, "b #h s t"]
    newest: Sequence[int] | None = None

    def ahead(self, offset: int) -> "Places":
        """Those of a later offset, in training, where a pass holds whole rows; their ends hold wrapped values, which no valid row sees."""
        return replace(self, positions=self.positions.roll(-offset, 1), modality=self.modality.roll(-offset, 1))

    def at(self, anchors: Int[Tensor, "b n"] | None) -> "Places":
        """Those of some anchors, which look at what all could look at; None keeps all."""
        if anchors is None:
            return self
        rows = anchors[:, None, :, None].expand(-1, self.mask.shape[1], -1, self.mask.shape[3])
        return replace(
            self,
            positions=gather(self.positions, anchors),
            modality=self.modality.gather(1, anchors),
            mask=self.mask.expand(-1, -1, self.modality.shape[1], -1).gather(2, rows),
        )


def hide_vectors(
    continuous: str, embedded: Float[Tensor, "b s d"], places: Places, vectors: Bool[Tensor, "b s"], placeholder: Float[Tensor, "... d"]
) -> tuple[Float[Tensor, "b s d"], Places]:
    """What a head reads of whole rows where some positions have a vector in place of a token.

    Args:
        continuous: see :class:`DraftConfig`.
        embedded: what the backbone reads.
        places: of offset 0.
        vectors: True where there is one.
        placeholder: what stands for each.
    """
    if continuous == "embeddings":
        return embedded, places
    if continuous == "masked":
        begin = torch.zeros(len(vectors), dtype=torch.long, device=vectors.device)
        places = replace(places, mask=mask_vectors(places.mask, vectors, begin))
    return torch.where(vectors[..., None], placeholder.to(embedded.dtype), embedded), places


def mask_vectors(mask: Bool[Tensor, "b #h s t"], vectors: Bool[Tensor, "b t"], first: Int[Tensor, " b"]) -> Bool[Tensor, "b #h s t"]:
    """The mask without the positions that have vectors, each of which still sees itself, for no row of the softmax may be empty.

    Args:
        mask: of a window.
        vectors: True where there is one.
        first: place of each row's window among what it may look at.
    """
    place = first[:, None] + torch.arange(mask.shape[2], device=first.device)
    own = place[..., None] == torch.arange(mask.shape[3], device=first.device)
    return mask & (~vectors[:, None] | own)[:, None]


def continuous_inputs(head: "Head") -> str:
    """What a head reads in place of vectors; heads whose configuration does not say so read the placeholder."""
    return head.config.continuous if isinstance(head.config, DraftConfig) else "placeholder"


@runtime_checkable
class Head(Protocol):
    """Drafts the tokens after the next one."""

    @property
    def config(self) -> Any:
        """Its :class:`HeadConfig`."""
        ...

    @property
    def mtp_depth(self) -> int:
        """D: how many tokens beyond the next one it predicts."""
        ...

    @property
    def num_modules(self) -> int:
        """Parts of its weights, of which every offset runs one: D where each offset has weights of its own, 1 where they are shared."""
        ...

    @property
    def num_caches(self) -> int:
        """Layers of keys and values that drafting needs; 0 where nothing is kept between passes.

        A head without any is shown the newest anchor alone. Where there is one layer, offset 1 fills it.
        """
        ...

    def forward(
        self,
        hidden: Float[Tensor, "b s d"],
        embedded: Float[Tensor, "b s d"],
        places: Places,
        anchors: Int[Tensor, "b n"] | None = None,
    ) -> list[Float[Tensor, "b n d"]]:
        """States of offsets 1..D at every position at once, for training.

        Args:
            hidden: the backbone's states before its final norm.
            embedded: embeddings of the same tokens.
            places: of offset 0: positions of x[t], modality of x[t+1].
            anchors: positions whose states are wanted, in order; None wants all. A head whose anchors do not look at each other's states
                need not compute the rest.

        Returns:
            D tensors, ready for the unembedding. The last k positions of offset k predict nothing; the loss leaves them out.
        """
        ...

    def draft(
        self,
        depth: int,
        state: Float[Tensor, "b s *state"],
        embedded: Float[Tensor, "b s d"],
        places: Places,
        caches: Sequence[LayerCache],
    ) -> tuple[Float[Tensor, "b s *left"], Float[Tensor, "b s d"]]:
        """One offset for the newest anchors, in decoding.

        Args:
            depth: k, from 1.
            state: what offset k-1 left at these anchors, in a shape of the head's own (k = 1: the backbone's hidden states).
            embedded: embeddings of x[t+k] at anchors t.
            places: of offset k.
            caches: ``num_caches`` layers; the head takes what belongs to ``depth``.

        Returns:
            What offset k+1 is to get as ``state``, and the state for the unembedding.
        """
        ...


@runtime_checkable
class VerticalHead(Head, Protocol):
    """A head that may predict rows of pictures before they start.

    Where ``vertical`` is above 0, ``forward`` gives one state more, the last: at a code x[t], that of the code below it.
    """

    @property
    def vertical(self) -> int:
        """How many codes of the row below may follow the D drafts of one pass; 0 where the row below is not predicted."""
        ...

    def below(
        self, hidden: Float[Tensor, "b s d"], embedded: Float[Tensor, "b s d"], places: Places, caches: Sequence[LayerCache]
    ) -> Float[Tensor, "b s d"]:
        """The state for the codes below the newest anchors, in decoding, after :meth:`draft` of offset 1 in the same pass.

        Args:
            hidden: the backbone's states.
            embedded: embeddings of x[t] at anchors t.
            places: of offset 0.
            caches: those of ``draft``.
        """
        ...


def vertical(head: Head) -> int:
    """How many codes of the row below a head drafts per pass; 0 for heads that know nothing of rows."""
    return head.vertical if isinstance(head, VerticalHead) else 0
