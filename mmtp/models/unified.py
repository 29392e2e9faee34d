"""The unified model: one embedding, one backbone, one unembedding over all media, and a head that predicts further ahead."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

import mmtp.config
from mmtp.models.backbone import Backbone, BackboneConfig, Context
from mmtp.models.connector import Connector, Projector
from mmtp.models.embed import Embedding
from mmtp.models.heads.base import DraftConfig, Head, HeadConfig, Places, continuous_inputs, hide_vectors, vertical
from mmtp.models.heads.flow import BlockFlow, FlowHead
from mmtp.models.heads.next import NextHead
from mmtp.models.loss import LossConfig, LossOutput, predicted_places, unified_loss
from mmtp.models.next_scale import NextScale, NextScaleConfig
from mmtp.models.refiner import Refiner
from mmtp.nn.attention import LayerCache, document_blocks, document_mask
from mmtp.nn.block import init_weights
from mmtp.nn.cross import last_span_mask
from mmtp.nn.experts import Routes
from mmtp.nn.windows import Windows
from mmtp.stream.ngrams import NGrams
from mmtp.stream.vocab import Special, VocabLayout
from mmtp.types import Batch, Modality

NGRAMS_FILE, REFINER_FILE = "ngrams.safetensors", "refiner.safetensors"


class UnifiedModel(nn.Module):
    """Predicts the next tokens of a stream, whatever they stand for.

    Args:
        config: vocabulary and sizes.

    Attributes:
        flex_attention: whether the backbone attends by FlexAttention to whole rows; training sets it.
        ngrams: of text, for drafts; kept in a file of its own beside the weights.
        refiner: of states, for drafts of codes; likewise.
    """

    slot_modality: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(mmtp.config.Config):
        """
        Attributes:
            layout: the vocabulary; tokenizers are named in it by name and fingerprint.
            backbone: sizes of the decoder.
            head: any registered head.
            tie_embeddings: use the embedding as unembedding.
            feature_width: width of continuous input features; 0 for none.
            connector: how these become vectors of the model's width; a table with ``type``.
            flow: the head that writes vectors, where the vocabulary says that the model does; a table with ``type``.
            next_scale: the pyramid of pictures that are written scale by scale; None writes codes one by one.
        """

        layout: VocabLayout
        backbone: BackboneConfig
        head: HeadConfig = field(default_factory=NextHead.Config)
        tie_embeddings: bool = True
        feature_width: int = 0
        connector: Connector.Config = field(default_factory=lambda: Projector.Config(layers=1))
        flow: FlowHead.Config | None = None
        next_scale: NextScaleConfig | None = None

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.layout.size, config.backbone.width, config.feature_width, config.connector)
        self.backbone = Backbone(config.backbone, config.layout.modalities)
        self.head: Any = config.head.build(backbone=config.backbone, modalities=config.layout.modalities)
        self.unembedding = (
            self.embedding.table if config.tie_embeddings else nn.Linear(config.backbone.width, config.layout.size, bias=False)
        )
        self._slot_modality = [slot.modality.index for slot in config.layout.slots]
        self._feature_slot = config.layout.slot_index.get("feature.codes.0")
        self.register_buffer("slot_modality", torch.tensor(self._slot_modality), persistent=False)
        assert isinstance(self.head, Head)
        if config.next_scale is not None and config.backbone.cross_attention_every:
            raise mmtp.config.ConfigError("next_scale: queries do not read vectors by cross-attention; leave out cross_attention_every")
        self.next_scale: Any = None if config.next_scale is None else NextScale(config.next_scale, config.layout, config.backbone.width)
        init_weights(self, config.backbone.depth)
        self.flow: Any = _build_flow(config)
        _check_cross(config)
        _check_window(config)
        self.flex_attention = False
        self.input_dropout: Mapping[str, float] = {}  # by modality, in training alone
        self.ngrams: NGrams | None = None
        self.refiner: Refiner | None = None

    def save_files(self, folder: Path) -> None:
        """Writes what is kept beside configuration and weights."""
        for kept, name in ((self.ngrams, NGRAMS_FILE), (self.refiner, REFINER_FILE)):
            if kept is None:
                (folder / name).unlink(missing_ok=True)  # of another model that stood there
            else:
                kept.save(folder / name)

    @classmethod
    def load_files(cls, config: Config, folder: Path) -> "UnifiedModel":
        """A model without its weights, with what is kept beside them.

        Raises:
            VocabMismatch: n-grams are of another vocabulary.
            NGramError: their file is damaged.
            RefinerError: that of the refiner is, or it is of a model of another width.
        """
        built = UnifiedModel(config)
        if (path := folder / NGRAMS_FILE).is_file():
            built.ngrams = NGrams.load(path, config.layout)
        if (path := folder / REFINER_FILE).is_file():
            built.refiner = Refiner.load(path, config.backbone.width)
        return built

    def forward(
        self,
        batch: Batch,
        *,
        detach: bool = False,
        drafts: bool = True,
        anchors: Int[Tensor, "b n"] | None = None,
        times: Float[Tensor, " vectors"] | None = None,
        predicted: Bool[Tensor, "b s"] | None = None,
    ) -> list[Float[Tensor, "b _ d"]]:
        """States of all offsets: the next token first, then one per draft offset, then that of the row below where the head has one.

        Args:
            batch: packed rows.
            detach: draft heads read the backbone without training it.
            drafts: whether their states are wanted.
            anchors: positions at which they are wanted; None wants all.
            times: of every vector of the batch that a block is made of, where these stand in it as points on their way from noise.
            predicted: places at which predictions of codes of a scale are wanted; None wants those under ``loss_mask``.
        """
        context = None
        if self.config.backbone.cross_attention_every:
            x = self.embedding(batch.tokens)
            context = self._context(batch, x)
        else:
            x = self.embedding.batch(batch)
        x = self._thinned(batch, x)
        if times is not None and batch.feature_index is not None:
            index = batch.feature_index[batch.loss_mask.flatten()[batch.feature_index]]
            x = x.flatten(0, 1).index_add(0, index, self.flow.embed_time(times).to(x.dtype)).view_as(x)
        # Always causal: a draft at t may know x[t+k], which a bidirectional span would carry back.
        window = self.config.backbone.window
        causal = document_mask(batch.document_ids, window=window)
        read, places = self.draft_inputs(self.head, batch, x.detach() if detach else x, causal)
        spans = input_spans(batch, self.config.layout, self.flow is not None and self.flow.block)
        positions, documents, until, queries = batch.positions, batch.document_ids, None, None
        if self.next_scale is not None:
            queries = self.next_scale.queries(batch, batch.loss_mask if predicted is None else predicted)
            if queries is None:
                x = x + self.next_scale.idle()
            else:
                x, positions, documents, spans, until = queries.appended(batch, x, spans)
        if self.flex_attention:
            mask = document_blocks(documents, spans, until, window)
        elif documents.device.type == "cpu" and (windows := Windows.of(documents, spans, until, window)) is not None:
            mask = windows
        else:
            mask = causal if spans is None else document_mask(documents, spans, until, window)
        modality = self.slot_modality[batch.slots]
        routes = self.backbone.routes(F.pad(modality, (0, x.shape[1] - modality.shape[1]), value=Modality.IMAGE.index))
        states = self.compute_states(x, positions, mask, read, places, detach, drafts, anchors, routes, context)
        return states if queries is None else [queries.predict(states[0]), *states[1:]]

    def _thinned(self, batch: Batch, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """Inputs of which some are left out, where it trains."""
        if not self.training or not any(self.input_dropout.values()):
            return x
        shares = torch.tensor([self.input_dropout.get(modality, 0.0) for modality in Modality], device=x.device)
        kept = torch.rand(x.shape[:2], device=x.device) >= shares[self.slot_modality[batch.slots]]
        return x * kept.unsqueeze(-1)

    def _context(self, batch: Batch, x: Float[Tensor, "b s d"]) -> Context:
        """What cross-attention reads of a batch; in a batch without vectors nothing, by the same arithmetic."""
        vectors = self.embedding.place(batch, torch.zeros_like(x))
        spans = input_spans(batch, self.config.layout)
        spans = torch.full_like(batch.slots, -1) if spans is None else spans
        return Context(vectors, last_span_mask(spans, batch.document_ids))

    def draft_inputs(
        self, head: Head, batch: Batch, embedded: Float[Tensor, "b s d"], mask: Bool[Tensor, "b 1 s s"]
    ) -> tuple[Float[Tensor, "b s d"], Places]:
        """What a head reads beside the backbone's states: embeddings, and where they stand.

        Args:
            head: of the model, or one that is to become it.
            batch: packed rows.
            embedded: what the backbone reads.
            mask: causal.
        """
        modality = self.slot_modality[batch.slots]
        places = Places(batch.positions, modality.roll(-1, 1), modality, mask)
        if batch.feature_index is None:
            return embedded, places
        vectors = torch.zeros_like(batch.loss_mask).flatten().index_fill(0, batch.feature_index, True).view_as(batch.loss_mask)
        # Where cross-attention reads the vectors, the backbone reads the placeholder as well.
        placeholder = embedded if self.config.backbone.cross_attention_every else self.embedding.table.weight[Special.FEATURE]
        return hide_vectors(continuous_inputs(head), embedded, places, vectors, placeholder)

    def compute_states(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | BlockMask | Windows,
        read: Tensor,
        places: Places,
        detach: bool,
        drafts: bool = True,
        anchors: Tensor | None = None,
        routes: Routes | None = None,
        context: Context | None = None,
    ) -> list[Tensor]:
        """The part of the forward pass that is arithmetic alone, and so can be compiled as one graph."""
        hidden = self.backbone(x, positions, mask, routes=routes, context=context)
        states = [self.backbone.norm(hidden)]
        if drafts and self.head.mtp_depth:
            hidden = hidden[:, : places.positions.shape[1]]  # queries stand behind the rows, and nothing is drafted from them
            states += self.head(hidden.detach() if detach else hidden, read, places, anchors)
        return states

    def loss(self, batch: Batch, config: LossConfig, group: dist.ProcessGroup | None = None) -> LossOutput:
        """Loss of a batch over all modalities and offsets, and of the vectors that the model writes.

        Args:
            batch: packed rows.
            config: weights.
            group: processes that the batch is divided among, where it is.
        """
        written = self._written(batch)
        features = index = times = goal = None
        if written is not None:
            features, index = written
            if self.flow.block:
                batch, times, goal = self._noised(batch, features)
        anchors = config.draw_anchors(batch) if self.head.mtp_depth else None
        predicted = predicted_places(batch, self.config.layout, config.inputs)
        states = self(batch, detach=config.detach, anchors=anchors, times=times, predicted=predicted)
        output = unified_loss(
            states,
            self.unembedding.weight,
            batch,
            self.config.layout,
            config,
            vertical(self.head) > 0,
            anchors,
            group,
            undrafted=None if self.next_scale is None else self.next_scale.slot,
        )
        if index is None:
            return output
        flat = states[0].flatten(0, 1)
        if goal is None:
            error = self.flow.error(features, flat[index - 1])
        else:
            error = (self.flow(flat[index]).float() - goal).square().mean()
        entry = self.config.layout.continuous
        assert entry is not None
        return replace(output, total=output.total + config.flow_weight * error, flow={entry.modality: float(error.detach())})

    def _written(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Vectors of a batch that the model is to write, and their flat places; None where there are none."""
        if self.flow is None or batch.features is None or batch.feature_index is None:
            return None
        targets = batch.loss_mask.flatten()[batch.feature_index]
        return (batch.features[targets], batch.feature_index[targets]) if targets.any() else None

    def _noised(self, batch: Batch, vectors: Tensor) -> tuple[Batch, Tensor, Tensor]:
        """The batch with points on the way to its written vectors in their place, their times (one per span), and their velocities."""
        assert batch.features is not None and batch.feature_index is not None
        targets = batch.loss_mask.flatten()[batch.feature_index]
        sizes = torch.tensor([len(targets)]) if batch.feature_grids is None else batch.feature_grids.prod(1)
        times = torch.rand(len(sizes), device=vectors.device).repeat_interleave(sizes.to(vectors.device))[targets]
        end, noise = self.flow.to_noise_units(vectors), torch.randn_like(vectors)
        points = self.flow.to_vectors(torch.lerp(noise, end, times[:, None]))
        return replace(batch, features=batch.features.masked_scatter(targets[:, None], points)), times, end - noise

    def embed(self, tokens: Int[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
        """Embeddings alone, as drafting needs them."""
        return self.embedding(tokens)

    def extend(
        self,
        embedded: Float[Tensor, "b s d"],
        positions: Int[Tensor, "b s 3"],
        mask: Tensor,
        caches: Sequence[LayerCache],
        slots: Sequence[Sequence[int]],
        seen: Bool[Tensor, "b 1 s t"] | None = None,
    ) -> Float[Tensor, "b s d"]:
        """Hidden states (before the final norm) of a few more positions, given what the caches hold.

        Args:
            embedded: of the positions, padded at the end.
            positions: rotary positions.
            mask: True where a position may look.
            caches: ``num_caches`` of the backbone's configuration.
            slots: of the grammar, in which the tokens of every row stand, without padding.
            seen: True at vectors that a position may read by cross-attention; None where there are none.
        """
        routes = None
        if self.backbone.num_experts:
            kinds = [[self._slot_modality[slot] for slot in row] for row in slots]
            routes = self.backbone.window_routes(kinds, embedded.shape[1])
        context = None
        if seen is not None:
            context = Context(embedded, seen)
            width = embedded.shape[1]
            inside = [[slot == self._feature_slot for slot in row] + [False] * (width - len(row)) for row in slots]
            placeholder = self.embedding.table.weight[Special.FEATURE]
            embedded = torch.where(torch.tensor(inside, device=embedded.device)[..., None], placeholder, embedded)
        return self.backbone(embedded, positions, mask, caches, routes, context)

    def write(
        self, states: Float[Tensor, "n d"], noise: Float[Tensor, "n c"], guides: Float[Tensor, "n d"], guidance: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n d"]]:
        """Vectors behind some positions, drawn each by itself, and what stands in the stream for them.

        Args:
            states: of the positions, after the final norm.
            noise: what the vectors are made of.
            guides: states of the unconditional branch; the same states where nothing guides.
            guidance: scale of each.
        """
        assert self.flow is not None, "the grammar opens spans of vectors for models that write them only"
        vectors = self.flow.sample(states, noise, *((guides, guidance) if (guidance != 1).any() else ()))
        return vectors, self.embedding.connect(vectors)

    def embed_points(self, points: Float[Tensor, "n c"], time: float) -> Float[Tensor, "n d"]:
        """What stands in the stream for points on their way from noise, of a span that is drawn as a block; at time 1 they are vectors."""
        times = torch.full((len(points),), time, device=points.device)
        return self.embedding.connect(self.flow.to_vectors(points)) + self.flow.embed_time(times)

    def ask(self, codes: Int[Tensor, " n"]) -> Float[Tensor, "m d"]:
        """Queries for the codes of the scale that follows.

        Args:
            codes: local ids of all scales before it.
        """
        assert self.next_scale is not None, "scales are due in models that write them only"
        return self.next_scale(codes[None])[0, len(codes) :]

    def num_parameters(self) -> int:
        """Parameters, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())


def _build_flow(config: UnifiedModel.Config) -> FlowHead | None:
    """The head that writes vectors, where there is one.

    Raises:
        ConfigError: the vocabulary has nothing that it could write, or has and the head is missing, or vectors do not go in one by one.
    """
    entry = config.layout.continuous
    if (entry is not None and entry.written) != (config.flow is not None):
        have = "no continuous tokenizer whose vectors a model writes" if config.flow is not None else "vectors that the model writes"
        raise mmtp.config.ConfigError(f"flow: the vocabulary has {have}; {'leave it out' if config.flow else 'give a table with its type'}")
    if config.flow is None:
        return None
    if config.connector.places((2, 3)) != (2, 3):
        raise mmtp.config.ConfigError("connector: a model that writes vectors reads them one by one; neither merge nor resample them")
    if not config.feature_width:
        raise mmtp.config.ConfigError("feature_width: a model that writes vectors needs their width")
    return config.flow.build(state_width=config.backbone.width, vector_width=config.feature_width)


def _check_cross(config: UnifiedModel.Config) -> None:
    """Refuses cross-attention to vectors that do not come in, or stand in the stream all the same.

    Raises:
        ConfigError: says what to leave out.
    """
    if not config.backbone.cross_attention_every:
        return
    if not config.feature_width:
        raise mmtp.config.ConfigError("backbone: cross_attention_every is for models that read vectors, and feature_width is 0")
    if config.flow is not None:
        raise mmtp.config.ConfigError("backbone: vectors that a model writes stand in the stream; leave out cross_attention_every or flow")
    if config.next_scale is not None:
        raise mmtp.config.ConfigError(
            "backbone: scales are not predicted beside cross-attention; leave out cross_attention_every or next_scale"
        )
    if isinstance(config.head, DraftConfig) and config.head.continuous == "embeddings":
        raise mmtp.config.ConfigError("head: continuous = 'embeddings', but vectors that cross-attention reads are none; leave it out")


def _check_window(config: UnifiedModel.Config) -> None:
    """Refuses a window of attention beside spans that are made as a whole.

    Raises:
        ConfigError: says what to leave out.
    """
    if config.backbone.window and (config.next_scale is not None or isinstance(config.flow, BlockFlow.Config)):
        part = "next_scale" if config.next_scale is not None else "flow"
        raise mmtp.config.ConfigError(f"backbone: what {part} writes at once sees all before it; leave out window or {part}")


def input_spans(batch: Batch, layout: VocabLayout, written: bool = False) -> Int[Tensor, "b s"] | None:
    """Number of the continuous input span each position belongs to, -1 outside; None where the batch holds none.

    Inside such a span positions see each other both ways: the features came in at once, nothing in it is predicted. Features that the
    model writes are predicted one after the other, and so are no such span, unless ``written`` counts them, where they are drawn as blocks.
    """
    index = layout.slot_index.get("feature.codes.0")
    if index is None or batch.features is None:
        return None
    inside = (batch.slots == index) & (~batch.loss_mask | written)
    starts = inside & ~F.pad(inside, (1, 0))[:, :-1]
    return torch.where(inside, starts.cumsum(1), -1)
