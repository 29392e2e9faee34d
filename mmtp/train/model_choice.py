"""Which model a recipe trains: a preset or a saved one, with what a recipe changes, and the weights that it starts from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mmtp.config import Config, ConfigError
from mmtp.hub import from_pretrained, is_language_model, read_config
from mmtp.models.backbone import OWN, upcycled
from mmtp.models.embed import NEW_ROWS_SPREAD, codebook_embeddings, start_rows
from mmtp.models.exchange import language_model_config, read_language_model
from mmtp.models.loss import check_modalities
from mmtp.models.next_scale import NextScaleConfig
from mmtp.models.presets import preset
from mmtp.models.unified import UnifiedModel
from mmtp.nn.block import Layer
from mmtp.nn.memory import without_weights
from mmtp.stream.vocab import MediaEntry, VocabLayout, VocabMismatch
from mmtp.tokenizers.quantizers import MultiScaleVQ
from mmtp.types import Modality


@dataclass(frozen=True, kw_only=True)
class ModelChoice(Config):
    """Which model is trained.

    Attributes:
        preset: a named size (see :mod:`mmtp.models.presets`); empty where training goes on from ``start``.
        start: a saved model to go on from, over the same tokenizers as far as both know them. Media of the shards that are new to it join
            its vocabulary, untrained; media that only it knows stay as they are. Where the shards hold continuous features and the model
            reads none, it gets an untrained projection for them. Or a language model, ``transformers:NAME`` (:mod:`mmtp.hf`), Qwen3- or
            Llama-like: its text keeps its embeddings, all else joins it; shards were then made with its tokenizer
            (``--text transformers:NAME``).
        backbone: values of the backbone that differ from the preset's. Beside ``start`` only two: ``modality_specific``, to give media
            weights of their own, which begin as copies of those they have shared (:func:`mmtp.models.backbone.upcycled`); and
            ``cross_attention_every``, for a model that reads no vectors yet, whose gates begin closed.
        head: a head's configuration (``type`` and values) in place of the preset's or of ``start``'s. Beside ``start`` the new head
            begins untrained, the rest keeps what it has learnt: so draft heads are added to a model that has none.
        connector: a connector's configuration (``type`` and values) in place of the preset's: how the vectors of a continuous tokenizer are
            read. One that joins cells or resamples needs shards of ``mmtp tokenize --merge`` or ``--queries``.
        flow: configuration of the head that writes vectors (``type`` and values), for data whose vectors are drawn.
        next_scale: let pictures whose codes are a pyramid of grids be written scale by scale (see :mod:`mmtp.models.next_scale`); needs
            the tokenizer that the shards name, whose codebook the model takes over. Beside ``start`` it is added to a model that writes
            them code by code.
        tie_embeddings: whether embedding and unembedding are one table; None leaves it to the preset. Untied, the embeddings of codes
            keep the nearness that ``codebook_init`` gives them: every step of a softmax moves all rows of a tied table.
        train: ``head`` freezes everything but the head (frozen-backbone heads as in Medusa-1, arXiv 2401.10774, section 2.2), ``features``
            everything but the projection of continuous features, and cross-attention where that reads them (feature alignment, the first
            stage of LLaVA, arXiv 2304.08485, section 4.2; Flamingo, arXiv 2204.14198, section 2.2).
        codebook_init: let the embeddings of codes (beside ``start``: of media that are new to it) start from the codebooks of their
            tokenizers, so that codes which look alike begin alike; needs the tokenizers that the shards name (zoo entries, or folders of
            that name).
        dropout: share of what every block that trains adds to the residual stream that is left out in a step, against learning few data by
            heart.
        input_dropout: by medium, share of its tokens whose embeddings are left out of the input in a step; targets stay (word dropout,
            Bowman et al., arXiv 1511.06349, section 3.1). Neighbouring codes tell so much of each other that a model of few recordings may
            never look at the words; the dropout of Tacotron's pre-net (arXiv 1703.10135, section 3.2) is there for the same reason.
        activation_checkpointing: let every block keep its input alone for the backward pass, and compute the rest once more there: less
            memory, a third more arithmetic, the same gradients.
        attention: ``sdpa``, or ``flex``: FlexAttention in the backbone, which skips what the documents of a packed row have nothing to do
            with; on accelerators.
        compile: let torch.compile fuse the forward and backward pass; needs a C++ compiler and a minute, and rounds differently.
    """

    preset: str = ""
    start: str = ""
    backbone: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    connector: dict[str, Any] = field(default_factory=dict)
    flow: dict[str, Any] = field(default_factory=dict)
    next_scale: bool = False
    tie_embeddings: bool | None = None
    train: Literal["all", "head", "features"] = "all"
    codebook_init: bool = False
    dropout: float = 0.0
    input_dropout: dict[str, float] = field(default_factory=dict)
    activation_checkpointing: bool = False
    attention: Literal["sdpa", "flex"] = "sdpa"
    compile: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model: dropout {self.dropout:g} is a share; at least 0 and less than 1 is wanted")
        check_modalities(self.input_dropout, "model.input_dropout")
        for medium, share in self.input_dropout.items():
            if not 0 <= share < 1:
                raise ConfigError(f"model: input_dropout.{medium} {share:g} is a share; at least 0 and less than 1 is wanted")

    def layout(self, found: VocabLayout) -> VocabLayout:
        """The model's vocabulary.

        Args:
            found: that over the shards.

        Raises:
            VocabMismatch: ``start`` was trained over another tokenizer of one kind; names both.
        """
        return VocabLayout.joined({self.start: self._known(found).layout, "the shards": found}) if self.start else found

    def config(self, layout: VocabLayout, feature_width: int = 0) -> UnifiedModel.Config:
        """The model's configuration over a vocabulary.

        Args:
            layout: see :meth:`layout`.
            feature_width: width of the continuous features that they hold; 0 for none.

        Raises:
            ConfigError: neither or both of ``preset`` and ``start`` are given, or an override does not fit.
        """
        if bool(self.preset) == bool(self.start):
            raise ConfigError("model: give either 'preset' or 'start'")
        if self.start:
            return self._started(layout, feature_width)
        data = preset(self.preset, layout).to_dict()
        data["backbone"] |= self.backbone
        data["head"] = self.head or data["head"]
        data["connector"] = self.connector or data["connector"]
        data["flow"] = self.flow or None
        data["next_scale"] = _pyramid(layout)[0].to_dict() if self.next_scale else None
        data["feature_width"] = feature_width
        if self.tie_embeddings is not None:
            data["tie_embeddings"] = self.tie_embeddings
        return UnifiedModel.Config.from_dict(data, "model")

    def model(self, layout: VocabLayout, feature_width: int = 0) -> UnifiedModel:
        """The model of :meth:`config`, with the weights that it starts from.

        Raises:
            ConfigError: a choice does not fit, or there is nothing to train.
        """
        config = self.config(layout, feature_width)
        if self.start:
            model = read_language_model(self.start, layout.text) if is_language_model(self.start) else from_pretrained(self.start)
            fresh = ("head.",) if self.head else ()
            fresh += ("embedding.features.",) if config.feature_width != model.config.feature_width else ()
            fresh += ("next_scale.",) if config.next_scale != model.config.next_scale else ()
            known = model.config.layout
            same = not fresh and (config.layout, config.backbone) == (known, model.config.backbone)
            model = model if same else rebuilt(model, config, fresh)
            if self.train == "all":
                model.refiner = None  # it refines states of the backbone as it was
            if self.codebook_init:
                start_from_codebooks(model, [entry for entry in config.layout.media if entry not in known.media], known=True)
        else:
            model = config.build()
            if self.codebook_init:
                start_from_codebooks(model, config.layout.media)
        if self.next_scale:
            quantizer = _pyramid(layout)[1]
            model.next_scale.take(quantizer.vq.codebook, quantizer.smooth)
        return self._prepared(model)

    def outline(self, layout: VocabLayout, feature_width: int = 0) -> UnifiedModel:
        """The model of :meth:`model` without weights: parameters that have shapes alone, and what it is before any training in its buffers.

        Raises:
            ConfigError: see :meth:`model`.
        """
        config = self.config(layout, feature_width)
        with without_weights():
            return self._prepared(config.build())

    def _prepared(self, model: UnifiedModel) -> UnifiedModel:
        """Lets the part of a model learn that is to learn, as it is to.

        Raises:
            ConfigError: there is nothing to train.
        """
        if self.train == "head":
            if not model.head.mtp_depth:
                raise ConfigError("model: train = 'head', but this head has nothing to learn; give 'head' a type that drafts")
            model.requires_grad_(False)
            model.head.requires_grad_(True)
        if self.train == "features":
            if model.embedding.features is None:
                raise ConfigError(
                    "model: train = 'features', but the shards hold no continuous features; tokenize with a continuous tokenizer"
                )
            model.requires_grad_(False)
            model.embedding.features.requires_grad_(True)
            model.backbone.cross.requires_grad_(True)
        for block in model.modules():
            if isinstance(block, Layer) and next(block.parameters()).requires_grad:
                block.dropout = self.dropout
        model.flex_attention = self.attention == "flex"
        model.input_dropout = self.input_dropout
        return model

    def _known(self, layout: VocabLayout) -> UnifiedModel.Config:
        """Of what training starts from; ``layout`` says what a text tokenizer is called."""
        return language_model_config(self.start, layout.text) if is_language_model(self.start) else read_config(self.start)

    def _started(self, layout: VocabLayout, feature_width: int) -> UnifiedModel.Config:
        """The saved model's configuration, with a new head, new media or a new connector where they are wanted."""
        if set(self.backbone) - {"modality_specific", "cross_attention_every"} or self.flow or self.tie_embeddings is not None:
            raise ConfigError(
                f"model: 'backbone' (but for modality_specific and cross_attention_every), 'flow' and 'tie_embeddings' belong to a preset; "
                f"{self.start} has its own"
            )
        known = self._known(layout)
        changes: dict[str, Any] = {"layout": layout.to_dict(), "backbone": known.backbone.to_dict() | self.backbone}
        changes |= {"head": self.head} if self.head else {}
        changes |= {"next_scale": _pyramid(layout)[0].to_dict()} if self.next_scale else {}
        if feature_width and not known.feature_width:
            changes |= {"feature_width": feature_width} | ({"connector": self.connector} if self.connector else {})
        elif self.connector:
            raise ConfigError(f"model: 'connector' is for shards with vectors and a model that reads none yet; {self.start} has its own")
        config = UnifiedModel.Config.from_dict(known.to_dict() | changes, "model")
        if known.feature_width and config.backbone.cross_attention_every != known.backbone.cross_attention_every:
            raise ConfigError(f"model: cross_attention_every is for a model that reads no vectors yet; {self.start} does")
        has, wanted = known.backbone.modality_specific, config.backbone.modality_specific
        if OWN.index(wanted) < OWN.index(has):
            raise ConfigError(f"model: modality_specific = {wanted!r}, but media of {self.start} have more of their own ({has!r}) to lose")
        return config


def rebuilt(model: UnifiedModel, config: UnifiedModel.Config, fresh: tuple[str, ...]) -> UnifiedModel:
    """The same model by another configuration: with another head, further media, or a connector, which begin untrained, or with weights
    for single media, which begin as copies.

    Args:
        model: whose weights are taken over.
        config: of the new model, whose vocabulary knows the tokenizers of the old one.
        fresh: how the names of the weights begin that are not taken over.

    Raises:
        ConfigError: the head that is kept was made for fewer media.
    """
    other = config.build()
    if config.layout == model.config.layout:
        other.ngrams, other.refiner = model.ngrams, model.refiner
    state, used = other.state_dict(), model.config.layout.used
    ids = torch.from_numpy(config.layout.ids_of(model.config.layout)[:used])
    for name, value in model.state_dict().items():
        if name.startswith(("backbone.", *fresh)):
            continue
        if name in ("embedding.table.weight", "unembedding.weight") and config.layout != model.config.layout:
            new = torch.ones(len(state[name]), dtype=torch.bool)
            new[ids] = False
            state[name][ids] = value[:used]
            start_rows(state[name], new)
        elif state[name].shape != value.shape:
            raise ConfigError(f"model: {name} of the model's head is for fewer media; give 'head', which then begins untrained")
        else:
            state[name] = value
    state |= upcycled(model.state_dict(), [name for name in state if name.startswith("backbone.")])
    other.load_state_dict(state)
    return other


UNTIED_STD = 0.3
"""Of the embeddings that start from codebooks, where they are no unembeddings: steps of AdamW are of one size whatever the row's,
and what many codes have in common should not be lost to the noise of few occurrences."""


@torch.no_grad()
def start_from_codebooks(model: UnifiedModel, media: Sequence[MediaEntry], known: bool = False) -> None:
    """Sets the embeddings and unembeddings of codes from their tokenizers' codebooks.

    Args:
        model: over these media and others.
        media: whose codes begin anew.
        known: the model has learnt of others before: mean and spread are then as of :func:`~mmtp.models.embed.start_rows`.

    Raises:
        VocabMismatch: a tokenizer of that name is not the one that the vocabulary was made with.
    """
    layout = model.config.layout
    media = [entry for entry in media if not entry.continuous]
    tables = [(model.unembedding.weight, *_moments(model.unembedding.weight, layout, media, 0.02, known))]
    if not model.config.tie_embeddings:
        table = model.embedding.table.weight
        tables.append((table, *_moments(table, layout, media, UNTIED_STD, known)))
    for entry in media:
        tokenizer = _tokenizer(entry)
        for k in range(len(entry.codebook_sizes)):
            rows = slice(*layout.code_range(entry.modality, k))
            vectors = tokenizer.codebook_vectors(k)
            for table, center, std in tables:
                table[rows] = center + codebook_embeddings(vectors, table.shape[1], std)


def _moments(table: Tensor, layout: VocabLayout, media: Sequence[MediaEntry], std: float, known: bool) -> tuple[Tensor | float, float]:
    """Mean and standard deviation that new embeddings of codes begin with; ``std`` where nothing is known yet."""
    if not known:
        return 0.0, std
    old = torch.ones(len(table), dtype=torch.bool)
    for entry in media:
        old[layout.code_range(entry.modality)[0] : layout.code_range(entry.modality, len(entry.codebook_sizes) - 1)[1]] = False
    rows = table[old]
    return rows.mean(0), NEW_ROWS_SPREAD * float(rows.std(0).square().mean().sqrt())


def _tokenizer(entry: MediaEntry) -> Any:
    """The tokenizer that a vocabulary names.

    Raises:
        VocabMismatch: what has that name is another one.
    """
    tokenizer = from_pretrained(entry.name)
    if (found := tokenizer.spec.fingerprint) != entry.fingerprint:
        raise VocabMismatch(f"{entry.name!r}: its fingerprint is {found}, but the shards were made with {entry.fingerprint}")
    return tokenizer


def _pyramid(layout: VocabLayout) -> tuple[NextScaleConfig, MultiScaleVQ]:
    """What a model that writes scale by scale is to know of pictures, and the quantizer that made their codes.

    Raises:
        ConfigError: the vocabulary has no pictures whose codes are a pyramid.
    """
    entry = next((entry for entry in layout.media if entry.modality is Modality.IMAGE and not entry.continuous), None)
    quantizer = None if entry is None else getattr(_tokenizer(entry), "quantizer", None)
    if not isinstance(quantizer, MultiScaleVQ):
        have = "no codes of pictures" if entry is None else f"pictures of {entry.name!r}, whose codes are one grid"
        raise ConfigError(f"model: next_scale is for pictures of a tokenizer with quantizer 'multi-scale-vq'; the shards have {have}")
    config = quantizer.config
    return NextScaleConfig(scales=config.scales, codebook_dim=config.codebook_dim, convolutions=config.convolutions), quantizer
