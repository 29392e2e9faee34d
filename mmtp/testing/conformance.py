"""What every tokenizer and every zoo entry is held to."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtp.hub import MAX_SHARD_BYTES, from_pretrained, iter_zoo, save_pretrained
from mmtp.testing.card import read_card
from mmtp.testing.golden import check_model_golden, check_tokenizer_golden, read_golden
from mmtp.tokenizers.base import EncodeOnlyError
from mmtp.types import Codes, Latents, MmtpError, Modality

ZOO_FILES = ("README.md", "config.json", "golden.safetensors", "recipe.toml")


class ConformanceError(MmtpError):
    """A promise that is not kept: says which."""


def check_tokenizer(tokenizer: Any, media: Sequence[Any]) -> None:
    """Holds a tokenizer to the promises of :mod:`mmtp.tokenizers.base`, on media of your choice.

    Args:
        tokenizer: of a registered class, in evaluation mode.
        media: at least two, of different sizes; tensors ``[c, *size]`` with values in the spec's range, or strings.

    Raises:
        ConformanceError: names the first promise that is not kept.
    """
    require(len(media) >= 2, "give at least two media, of different sizes")
    _check_spec(tokenizer)
    if tokenizer.spec.codebook_sizes:
        _check_codes(tokenizer, media)
    else:
        _check_latents(tokenizer, media)
    _check_round_trip(tokenizer, media)
    if tokenizer.spec.modality is not Modality.TEXT:
        _check_sizes_without_network(tokenizer, media)
    _check_saved(tokenizer, media)


def check_zoo_entry(folder: Path) -> None:
    """Holds a zoo entry (or any folder of that format) to what the zoo promises.

    It holds card, configuration, recipe and golden file, each file at most 15 MiB, and no code; the card has its sections; the recipe
    parses; the entry loads; the golden file is reproduced; a model's vocabulary names tokenizers as the zoo holds them.

    Raises:
        MmtpError: names the folder and what is wrong.
    """
    for name in ZOO_FILES:
        require((folder / name).is_file(), f"{folder}: has no {name}")
    for path in sorted(folder.rglob("*")):
        require(path.suffix != ".py", f"{path}: the zoo holds data only")
        require(path.stat().st_size <= MAX_SHARD_BYTES, f"{path}: is larger than {MAX_SHARD_BYTES >> 20} MiB")
    card = read_card(folder / "README.md")
    require(card.name == folder.name, f"{folder / 'README.md'}: is titled {card.name!r}, not {folder.name!r}")
    _check_recipe(folder / "recipe.toml")
    entry = from_pretrained(folder)
    golden = read_golden(folder / "golden.safetensors")
    try:
        if hasattr(entry, "spec"):
            check_tokenizer_golden(entry, golden)
        else:
            check_model_golden(entry, golden)
    except MmtpError as error:
        raise ConformanceError(f"{folder / 'golden.safetensors'}: is not reproduced: {error}") from error
    if not hasattr(entry, "spec"):
        _check_vocabulary(entry, folder)


def _check_spec(tokenizer: Any) -> None:
    spec = tokenizer.spec
    require(bool(spec.fingerprint), "spec.fingerprint is empty")
    require(bool(spec.codebook_sizes) != bool(spec.latent_dim), "spec must have either codebook_sizes or latent_dim")
    require(all(n >= 2 for n in spec.codebook_sizes), f"spec.codebook_sizes are {spec.codebook_sizes}; 2 is the least")
    if spec.modality is not Modality.TEXT:
        require(spec.channels >= 1 and bool(spec.downsampling), "spec of a medium needs channels and downsampling")


def _check_codes(tokenizer: Any, media: Sequence[Any]) -> None:
    codes: Codes = tokenizer.encode(media)
    sizes = tokenizer.spec.codebook_sizes
    require(codes.ids.dtype == torch.int64, f"codes are {codes.ids.dtype}, not int64")
    require(codes.ids.shape[:2] == (len(media), len(sizes)), f"codes are {list(codes.ids.shape)} for {len(media)} media")
    for k, size in enumerate(sizes):
        least, most = (int(codes.ids[:, k].amin()), int(codes.ids[:, k].amax())) if codes.ids[:, k].numel() else (0, 0)
        require(least >= 0 and most < size, f"codes of codebook {k} are {least} to {most}, its size is {size}")
    again = tokenizer.encode(media)
    require(torch.equal(codes.ids, again.ids), "encode gives other codes when it is run again")
    backwards = tokenizer.encode(list(reversed(media)))
    for i, medium in enumerate(media):
        item = codes.item(i)
        require(torch.equal(item, tokenizer.encode([medium]).item(0)), f"codes of item {i} depend on what else is in the batch")
        require(torch.equal(item, backwards.item(len(media) - 1 - i)), f"codes of item {i} depend on its place in the batch")
        window = tuple(slice(0, int(n)) for n in codes.lengths[i])
        rest = codes.ids[i].clone()
        rest[(slice(None), *window)] = 0
        require(not rest.any(), f"codes of item {i} are not 0 after its end")


def _check_round_trip(tokenizer: Any, media: Sequence[Any]) -> None:
    spec = tokenizer.spec
    try:
        back = tokenizer.decode(tokenizer.encode(media))
    except EncodeOnlyError:
        return
    require(len(back) == len(media), f"decode gives {len(back)} media for {len(media)}")
    for i, (medium, again) in enumerate(zip(media, back, strict=True)):
        if isinstance(medium, str):
            require(medium == again, f"text {i} comes back as {again[:40]!r}")
            continue
        require(again.shape == medium.shape, f"item {i} comes back as {list(again.shape)}, it was {list(medium.shape)}")
        least, most = float(again.amin()), float(again.amax())
        inside = spec.value_range[0] <= least and most <= spec.value_range[1]
        require(inside, f"item {i} comes back with values {least:.3g} to {most:.3g}, outside {spec.value_range}")


def _check_latents(tokenizer: Any, media: Sequence[Any]) -> None:
    latents: Latents = tokenizer.encode(media)
    width = latents.values.shape[-1]
    require(width == tokenizer.spec.latent_dim, f"latents are {width} wide, spec.latent_dim is {tokenizer.spec.latent_dim}")
    require(torch.equal(latents.values, tokenizer.encode(media).values), "encode gives other latents when it is run again")
    for i, medium in enumerate(media):
        n = int(latents.lengths[i])
        require(not latents.values[i, n:].any(), f"latents of item {i} are not 0 after its end")
        places = [tuple(place) for place in latents.coordinates[i, :n].tolist()]
        on_grid = [place for place in places if min(place) >= 0]
        whole = list(product(*map(range, tokenizer.grid(tuple(medium.shape[1:])))))
        require(on_grid == whole, f"coordinates of item {i} are not those of every cell of its grid, in reading order")
        require(places[n - len(whole) :] == whole, f"latents of item {i} that have no place on the grid do not come first")
        alone = tokenizer.encode([medium]).values[0]
        require(torch.equal(latents.values[i, :n], alone[:n]), f"latents of item {i} depend on what else is in the batch")


def _check_sizes_without_network(tokenizer: Any, media: Sequence[Tensor]) -> None:
    with _network_forbidden(tokenizer):
        grids = [tuple(tokenizer.grid(tuple(m.shape[1:]))) for m in media]
        counts = [tokenizer.num_tokens(tuple(m.shape[1:])) for m in media]
    encoded = tokenizer.encode(media)
    for i, (grid, count) in enumerate(zip(grids, counts, strict=True)):
        if isinstance(encoded, Codes):
            real = tuple(encoded.lengths[i].tolist())
            require(grid == real, f"grid says {grid} for item {i}, encode gives {real}")
            given = encoded.item(i).numel()
        else:
            given = int(encoded.lengths[i])
        require(count == given, f"num_tokens says {count} for item {i}, encode gives {given}")


def _check_saved(tokenizer: Any, media: Sequence[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        loaded = from_pretrained(save_pretrained(tokenizer, folder))
        loaded_fingerprint = loaded.spec.fingerprint
        require(loaded_fingerprint == tokenizer.spec.fingerprint, "the fingerprint changes when a tokenizer is saved and loaded")
        first, second = tokenizer.encode(media), loaded.encode(media)
        tensors = (first.ids, second.ids) if isinstance(first, Codes) else (first.values, second.values)
        require(torch.equal(*tensors), "a tokenizer gives other codes when it is saved and loaded")
        state = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
        if weight := next((name for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()), None):
            state[weight] += 1
            loaded.load_state_dict(state)
            require(loaded.spec.fingerprint != loaded_fingerprint, f"the fingerprint stays the same when {weight} changes")


def _check_recipe(path: Path) -> None:
    from mmtp.train.recipe import load_recipe

    load_recipe(path)


def _check_vocabulary(model: Any, folder: Path) -> None:
    zoo = {path.name: path for family, path in iter_zoo() if family == "tokenizer"}
    layout = model.config.layout
    for entry in (*((layout.text,) if layout.text else ()), *layout.media):
        if entry.name in zoo:
            found = from_pretrained(zoo[entry.name]).spec.fingerprint
            message = f"{folder}: was trained with {entry.name} {entry.fingerprint}, the zoo holds {found}"
            require(found == entry.fingerprint, message)


@contextmanager
def _network_forbidden(tokenizer: Any) -> Iterator[None]:
    def refuse(*_: Any) -> None:
        raise ConformanceError("grid and num_tokens must answer without running the network")

    hooks = [m.register_forward_pre_hook(refuse) for m in tokenizer.modules()] if isinstance(tokenizer, nn.Module) else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def require(kept: bool, message: str) -> None:
    if not kept:
        raise ConformanceError(message)
