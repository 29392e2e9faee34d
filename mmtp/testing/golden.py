"""Golden files: inputs, and what a tokenizer or model made of them on the day it was released.

Other processors sum in another order, so a golden file carries the tolerance that was measured for it. Text codes must be equal. For
pictures and sound the codes must be equal but for ``CODE_SHARE`` of them (a latent that lies on the border of two codes), and the
decoder, given the *stored* codes, must give the stored medium within the tolerance. Of a continuous tokenizer the latents must be those
that are stored, within the tolerance.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import collate
from mmtp.types import Codes, MmtpError, Modality

CODE_SHARE = 0.005
"""Share of codes that may differ from machine to machine."""


class GoldenError(MmtpError):
    """A golden file that cannot be read, or is not reproduced: names the tensor and by how much it is off."""


@dataclass(frozen=True)
class Golden:
    """What a golden file holds.

    Attributes:
        tensors: inputs and outputs by name.
        tolerance: greatest absolute difference of floating-point outputs.
        notes: where and with what it was made.
    """

    tensors: dict[str, Tensor]
    tolerance: float
    notes: dict[str, str] = field(default_factory=dict)


def write_golden(path: Path, golden: Golden) -> None:
    """Writes a golden file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    metadata = {"tolerance": repr(golden.tolerance), "notes": json.dumps(golden.notes, sort_keys=True)}
    save_file({k: v.contiguous() for k, v in golden.tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def read_golden(path: Path) -> Golden:
    """Reads a golden file.

    Raises:
        GoldenError: it is missing, damaged, or carries no tolerance.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise GoldenError(f"{path}: cannot be read as a golden file ({error})") from error
    try:
        return Golden(tensors, float(metadata["tolerance"]), json.loads(metadata.get("notes", "{}")))
    except (KeyError, ValueError) as error:
        raise GoldenError(f"{path}: metadata must hold 'tolerance', a number, and 'notes', a JSON object") from error


def tokenizer_golden(tokenizer: Any, media: Sequence[Any]) -> dict[str, Tensor]:
    """Inputs, codes and reconstruction of a discrete tokenizer, inputs and latents of a continuous one, as tensors."""
    if tokenizer.spec.latent_dim:
        latents = tokenizer.encode(media)
        inputs = {f"input.{i}": _as_tensor(item) for i, item in enumerate(media)}
        return {"values": latents.values, "coordinates": latents.coordinates, "lengths": latents.lengths} | inputs
    codes = tokenizer.encode(media)
    tensors = {"codes": codes.ids, "lengths": codes.lengths}
    if codes.sizes is not None:
        tensors["sizes"] = codes.sizes
    for i, (item, back) in enumerate(zip(media, tokenizer.decode(codes), strict=True)):
        tensors[f"input.{i}"] = _as_tensor(item)
        tensors[f"output.{i}"] = _as_tensor(back)
    return tensors


def golden_media(tokenizer: Any, golden: Golden) -> list[Any]:
    """The inputs of a tokenizer's golden file, as ``encode`` takes them."""
    count = sum(name.startswith("input.") for name in golden.tensors)
    inputs = [golden.tensors[f"input.{i}"] for i in range(count)]
    return [bytes(t.tolist()).decode() for t in inputs] if tokenizer.spec.modality is Modality.TEXT else inputs


def check_tokenizer_golden(tokenizer: Any, golden: Golden) -> None:
    """Holds a tokenizer to a golden file.

    Raises:
        GoldenError: names what differs and by how much.
    """
    text, media = tokenizer.spec.modality is Modality.TEXT, golden_media(tokenizer, golden)
    count = len(media)
    if tokenizer.spec.latent_dim:
        found = tokenizer_golden(tokenizer, media)
        for name in ("lengths", "coordinates", "values"):
            _check_close(name, found[name], golden.tensors[name], golden.tolerance if name == "values" else 0.0)
        return
    stored = Codes(golden.tensors["codes"], golden.tensors["lengths"], golden.tensors.get("sizes"))
    now = tokenizer.encode(media)
    if not torch.equal(now.lengths, stored.lengths):
        raise GoldenError(f"grids differ: {now.lengths.tolist()} now, {stored.lengths.tolist()} stored")
    wrong = sum(int((now.item(i) != stored.item(i)).sum()) for i in range(count))
    total = sum(stored.item(i).numel() for i in range(count))
    if wrong > (0 if text else CODE_SHARE * total):
        raise GoldenError(f"{wrong} of {total} codes differ")
    for i, back in enumerate(tokenizer.decode(stored)):
        _check_close(f"output.{i}", _as_tensor(back), golden.tensors[f"output.{i}"], golden.tolerance)


def model_golden(model: Any, tokens: Int[Tensor, " s"]) -> dict[str, Tensor]:
    """A stream, and the log-probability (nats) that every offset of the model gives to each of its tokens.

    ``logprobs[k, t]`` belongs to ``tokens[t + 1 + k]`` as predicted at ``t``; 0 where the stream has ended.
    """
    grammar = StreamGrammar(model.config.layout)
    document = (tokens.numpy(), torch.ones(len(tokens), dtype=torch.bool).numpy())
    with torch.no_grad():
        states = model(collate([document], grammar, len(tokens)))
        logprobs = torch.zeros(len(states), len(tokens))
        for k, state in enumerate(states):
            ahead = tokens[1 + k :]
            logits = state[0, : len(ahead)] @ model.unembedding.weight.T
            logprobs[k, : len(ahead)] = logits.float().log_softmax(-1).gather(1, ahead[:, None])[:, 0]
    return {"tokens": tokens, "logprobs": logprobs}


def check_model_golden(model: Any, golden: Golden) -> None:
    """Holds a model to a golden file.

    Raises:
        GoldenError: names the offset that differs and by how much.
    """
    now = model_golden(model, golden.tensors["tokens"])["logprobs"]
    stored = golden.tensors["logprobs"]
    if now.shape != stored.shape:
        raise GoldenError(f"the model predicts {now.shape[0]} offsets, the golden file holds {stored.shape[0]}")
    for k in range(len(stored)):
        _check_close(f"logprobs[{k}]", now[k], stored[k], golden.tolerance)


def _as_tensor(item: Any) -> Tensor:
    if isinstance(item, str):
        return torch.tensor(list(item.encode()), dtype=torch.uint8)
    return item.detach().cpu().contiguous()


def _check_close(name: str, now: Tensor, stored: Tensor, tolerance: float) -> None:
    if now.shape != stored.shape:
        raise GoldenError(f"{name}: shape {list(now.shape)} now, {list(stored.shape)} stored")
    worst = float((now.double() - stored.double()).abs().amax()) if now.numel() else 0.0
    if not worst <= tolerance:
        raise GoldenError(f"{name}: off by {worst:.3g}, {tolerance:.3g} is allowed")
