"""Unified models from and to checkpoints of transformers: Qwen3's and Llama's layout, with DeepSeek-V3's for draft modules.

There the ids of text come first, as its ``tokenizer.json`` has them; here specials do. A checkpoint that was exported says in its
``config.json``, under ``mmtp``, which model it was, so that it becomes this model again.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor

from mmtp.hf import open_checkpoint, save_checkpoint
from mmtp.hub import from_pretrained
from mmtp.models.deepseek import from_deepseek, to_deepseek
from mmtp.models.embed import start_rows
from mmtp.models.heads.next import NextHead
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.qwen3 import backbone_config, checkpoint_config, from_qwen3, to_qwen3
from mmtp.models.unified import UnifiedModel
from mmtp.stream.vocab import Special, TextEntry, VocabLayout
from mmtp.types import MmtpError, Modality

RECORD = "mmtp"
"""Key of ``config.json`` under which an exported model's own configuration stands."""

MODULES = "num_nextn_predict_layers"
"""Key under which DeepSeek-V3 counts draft modules."""

_STARTS = {Special.BOS: "bos_token_id", Special.EOS: "eos_token_id", Special.END: "eos_token_id"}
_TABLES = ("embedding.table.weight", "unembedding.weight")


class ExchangeError(MmtpError):
    """A model that cannot go from one library to the other: names what has no place there."""


def language_model_config(name: str, text: TextEntry | None = None) -> UnifiedModel.Config:
    """Configuration of the model that :func:`read_language_model` gives.

    Args:
        name: see :mod:`mmtp.hf`.
        text: what a vocabulary calls its text tokenizer; kept where it is the model's.

    Raises:
        HubError: there is no such model, or a file of it is missing.
        Qwen3Error: it is neither Qwen3- nor Llama-like; names the field.
    """
    config = open_checkpoint(name).config
    if RECORD in config:
        found = UnifiedModel.Config.from_dict(config[RECORD], f"{name}: {RECORD}")
    else:
        modules = config.get(MODULES) or 0
        found = UnifiedModel.Config(
            layout=VocabLayout(_text(name)[0], (), max_dim=1),
            backbone=backbone_config(config),
            head=SequentialHead.Config(mtp_depth=modules) if modules else NextHead.Config(),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    own = found.layout.text
    if own and text and (own.size, own.fingerprint) == (text.size, text.fingerprint):
        found = replace(found, layout=replace(found.layout, text=text))
    return found


def read_language_model(name: str, text: TextEntry | None = None) -> UnifiedModel:
    """A language model of transformers as a unified model over its text; or the unified model that was exported as it.

    Ids of text keep their embeddings. Those of specials begin as :func:`~mmtp.models.embed.start_rows` has it, of those that begin and end
    documents and turns as the checkpoint's own for that.

    Args:
        name: see :mod:`mmtp.hf`.
        text: see :func:`language_model_config`.

    Raises:
        HubError: there is no such model, or a file of it is missing or damaged.
        Qwen3Error: it is neither Qwen3- nor Llama-like; names the field or weight.
        ExchangeError: it has fewer embeddings than ids.
    """
    checkpoint = open_checkpoint(name)
    config = language_model_config(name, text)
    state = {key: value.float() for key, value in checkpoint.weights().items()}
    backbone, *tables = from_qwen3(state, config.backbone)
    own = {f"backbone.{key}": value for key, value in backbone.items()}
    if not isinstance(config.head, NextHead.Config):
        own |= {f"head.{key}": value for key, value in from_deepseek(state, config.backbone).items()}
    for key, table in zip(_TABLES, tables, strict=True):
        wanted = config.layout.size if RECORD in checkpoint.config else _text(name)[1]
        if len(table) < wanted:
            raise ExchangeError(f"{name}: {wanted} ids, but {len(table)} embeddings; its tokenizer is that of another model")
        if RECORD in checkpoint.config:
            own[key] = table[torch.from_numpy(config.layout.text_first())]
        else:
            own[key] = _extended(table[:wanted], config.layout, checkpoint.config)
    if config.tie_embeddings:
        own[_TABLES[1]] = own[_TABLES[0]]
    model: UnifiedModel = config.build()
    model.load_state_dict(own)
    return model.eval()


def export_language_model(
    model: UnifiedModel, folder: str | Path, tokenizer: str | None = None, *, drafts: bool = True, dtype: str = "float32"
) -> None:
    """Writes a model as a checkpoint of transformers, over its whole vocabulary.

    Args:
        model: without parts that the layout has no place for.
        folder: is made; must be empty.
        tokenizer: content of the text tokenizer's ``tokenizer.json``, where the vocabulary has one.
        drafts: with the modules of a draft head, as layers behind the backbone's.
        dtype: of the weights: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ExchangeError: names what has no place, or what the text tokenizer lacks.
        Qwen3Error: media have weights of their own.
        HubError: the folder is not empty.
    """
    config, layout, state = model.config, model.config.layout, model.state_dict()
    _check_places(model, drafts)
    if layout.text and tokenizer is None:
        raise ExchangeError(f"the vocabulary has text of {layout.text.name!r}; its tokenizer is needed as well")
    rows = torch.from_numpy(layout.text_first()).argsort().to(model.unembedding.weight.device)
    weights = to_qwen3(_part(state, "backbone."), config.backbone, *(state[key][rows] for key in _TABLES))
    if config.tie_embeddings:
        del weights["lm_head.weight"]
    modules = model.head.num_modules if drafts and isinstance(model.head, SequentialHead) else 0
    if modules:
        weights |= to_deepseek(_part(state, "head."), config.backbone)
    record = config if drafts else replace(config, head=NextHead.Config())
    ids = _Ids(layout)
    fields = {
        **checkpoint_config(config.backbone),
        "vocab_size": layout.size,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
        **ids.ends,
        **({MODULES: modules} if modules else {}),
        RECORD: record.to_dict(),
    }
    files = {"generation_config.json": _json(ids.generation()), "README.md": _card(layout, modules)}
    if layout.text and tokenizer is not None:
        files |= {"tokenizer.json": tokenizer, "tokenizer_config.json": _json(ids.tokenizer(tokenizer))}
    numbers = {key: value.detach().to("cpu", getattr(torch, dtype), copy=True) for key, value in weights.items()}
    save_checkpoint(Path(folder), fields, numbers, files)


def positions_differ(layout: VocabLayout) -> list[Modality]:
    """Media whose codes have a place on several axes, which the rotary embedding of Qwen3 and Llama does not know."""
    return [entry.modality for entry in layout.media if entry.modality is not Modality.AUDIO]


class _Ids:
    """Names and ids in a checkpoint's order.

    Args:
        layout: the vocabulary.
    """

    def __init__(self, layout: VocabLayout) -> None:
        lo, hi = layout.text_range
        self.layout, self.first = layout, hi - lo
        self.ours = layout.text_first().argsort().tolist()
        self.stops = [self.first + Special.END, self.first + Special.EOS]
        self.ends = {
            "bos_token_id": self.first + Special.BOS,
            "eos_token_id": self.stops,
            "pad_token_id": self.first + Special.PAD,
        }

    def name(self, id_: int) -> str:
        """What an id is called that ``tokenizer.json`` has not."""
        own = self.ours[id_]
        return f"<|mmtp {self.layout.describe(own).strip('<>') if own < self.layout.used else f'unused id {own}'}|>"

    def generation(self) -> dict[str, Any]:
        """``generation_config.json``. The grammar says here what may stand where; without it, only text is sure to be text."""
        others = [i for i in range(self.first, self.layout.size) if i not in self.stops]
        return self.ends | ({"suppress_tokens": others} if self.first else {})

    def tokenizer(self, content: str) -> dict[str, Any]:
        """``tokenizer_config.json``: names of the ids behind those of ``tokenizer.json``, and the wording of a conversation.

        Raises:
            ExchangeError: these would not be the next ids, or a name is taken.
        """
        known = Tokenizer.from_str(content).get_vocab(with_added_tokens=True)
        # PreTrainedTokenizerFast gives added tokens the next free ids, in this order.
        names = {i: self.name(i) for i in range(len(known), self.layout.size)}
        if max(known.values()) + 1 != len(known) or len(known) > self.first or known.keys() & {*names.values()}:
            raise ExchangeError(f"tokenizer.json: its {len(known)} tokens have gaps, are more than the model's, or have a name of mmtp's")
        plain = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
        bos, end, pad, assistant = (names[self.first + special] for special in (Special.BOS, Special.END, Special.PAD, Special.ASSISTANT))
        turn = "{{ '<|mmtp ' + m.role + '|>' + m.content + '" + end + "' }}"
        answer = "{% if add_generation_prompt %}" + assistant + "{% endif %}"
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": end,
            "pad_token": pad,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {str(i): {"content": name, **plain} for i, name in names.items()},
            "chat_template": bos + "{% for m in messages %}" + turn + "{% endfor %}" + answer,
        }


def _card(layout: VocabLayout, modules: int) -> str:
    """``README.md`` of a checkpoint: which id is what, and what another library does not do."""
    lo, hi = layout.text_range
    first, dims = hi - lo, layout.dim_range
    rows = [(0, first, f"text of {layout.text.name}")] if layout.text else []
    rows += [(first, first + lo, "specials"), (*dims, "extents of grids")]
    rows += [
        (*layout.code_range(entry.modality, k), f"{entry.modality}, codebook {k} of {entry.name}")
        for entry in layout.media
        for k in range(len(entry.codebook_sizes))
    ]
    said = ["Exported by mmtp.", "", "| ids | what |", "|---|---|", *(f"| {a} to {b - 1} | {what} |" for a, b, what in rows), ""]
    said += [
        "`generation_config.json` lets text alone be written: other libraries do not know mmtp's grammar, which says what may stand where."
    ]
    if differ := positions_differ(layout):
        media = " and ".join(f"{medium}s" for medium in differ)
        said += [f"Codes of {media} stand on several axes in mmtp, and on one here: states at and behind them differ from mmtp's."]
    if modules:
        said += [f"{modules} draft modules follow the layers, in DeepSeek-V3's layout; they read states ahead of the last norm."]
    return "\n".join(said) + "\n"


def _check_places(model: UnifiedModel, drafts: bool) -> None:
    """Refuses what the layout cannot hold.

    Raises:
        ExchangeError: names it.
    """
    known = ("embedding.table.", "unembedding.", "backbone.", "head.")
    if strange := [key for key in model.state_dict() if not key.startswith(known)]:
        raise ExchangeError(f"{strange[0]}: Qwen3's layout has no place for this weight, for it holds models that read and write ids alone")
    head = model.config.head
    if not drafts or isinstance(head, NextHead.Config):
        return
    kind = head.to_dict()["type"]
    if not isinstance(head, SequentialHead.Config):
        raise ExchangeError(f"head {kind!r}: the layout has no place for it; leave the drafts out (--no-drafts)")
    if head.sizes(model.config.backbone) != model.config.backbone:
        raise ExchangeError(
            f"head {kind!r}: its mlp_width is not the backbone's, which the layout wants; leave the drafts out (--no-drafts)"
        )


@cache
def _text(name: str) -> tuple[TextEntry, int]:
    """The text tokenizer of a model, and how many of its ids the model knows: those of its file."""
    tokenizer = from_pretrained(name)
    return TextEntry(name, tokenizer.spec.codebook_sizes[0], tokenizer.spec.fingerprint), tokenizer.file_size


def _extended(table: Float[Tensor, "v d"], layout: VocabLayout, config: Mapping[str, Any]) -> Float[Tensor, "w d"]:
    """A table of text alone as one of the whole vocabulary."""
    lo = layout.text_range[0]
    words = slice(lo, lo + len(table))
    out = table.new_empty(layout.size, table.shape[1])
    out[words] = table
    new = torch.ones(layout.size, dtype=torch.bool)
    new[words] = False
    start_rows(out, new)
    for special, field in _STARTS.items():
        found = config.get(field)
        token = found[0] if isinstance(found, list) and found else found
        if isinstance(token, int) and 0 <= token < len(table):
            out[special] = table[token]
    return out


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"
