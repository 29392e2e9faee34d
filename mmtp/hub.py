"""One folder format for checkpoints, zoo entries and Hub repositories.

A folder holds ``config.json`` (registry names and values), ``model.safetensors`` (or shards ``model-00001-of-00002.safetensors``),
``README.md`` (the card), ``recipe.toml`` (what ``mmtp train`` read), ``golden.safetensors`` (inputs and what they must give) and
whatever files the class keeps beside them. ``from_pretrained`` takes the name of a zoo entry, a path or a Hub id; and, of a language
model of transformers, ``transformers:NAME``, whose text tokenizer it gives.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from mmtp.config import Config, build_config, load_file
from mmtp.registry import REGISTRY
from mmtp.types import MmtpError

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 15 * 2**20
LIBRARY, SMOLLM2 = "transformers:", "smollm2"
ZOO_FOLDERS = {"tokenizer": "tokenizers", "model": "models"}


class HubError(MmtpError):
    """A folder, name or Hub id that does not hold what was asked for."""


@runtime_checkable
class Pretrained(Protocol):
    """What the folder format needs of a class: a configuration, weights, and files of its own if it has any."""

    @property
    def config(self) -> Any: ...

    def state_dict(self) -> dict[str, "Tensor"]: ...

    def load_state_dict(self, state_dict: Mapping[str, "Tensor"], strict: bool = True) -> Any: ...


class FileBacked(Pretrained, Protocol):
    """A class that keeps files beside its weights (a ``tokenizer.json``, a vocabulary)."""

    def save_files(self, folder: Path) -> None: ...

    @classmethod
    def load_files(cls, config: Config, folder: Path) -> Pretrained: ...


def zoo_root(family: str) -> Path:
    """Where the zoo's entries of a family lie: in the wheel beside the code, in a checkout at its root."""
    packaged = Path(str(resources.files("mmtp"))) / "zoo_data" / ZOO_FOLDERS[family]
    return packaged if packaged.is_dir() else Path(__file__).resolve().parent.parent / ZOO_FOLDERS[family]


def zoo_entries(family: str) -> list[str]:
    """Names of the zoo's entries."""
    root = zoo_root(family)
    return sorted(p.name for p in root.iterdir() if (p / "config.json").is_file()) if root.is_dir() else []


def is_language_model(name: str | Path) -> bool:
    """Whether a name means a language model in transformers' format (:mod:`mmtp.hf`): ``transformers:NAME``, or ``smollm2``."""
    return str(name) == SMOLLM2 or (str(name).startswith(LIBRARY) and str(name) != LIBRARY)


def find(name: str | Path) -> Path:
    """The folder of a zoo entry, a path or a Hub id (``owner/name``, needs the ``hf`` extra).

    Raises:
        HubError: nothing is found; names the nearest zoo entry.
    """
    if is_language_model(name):
        raise HubError(f"{name}: is a language model of transformers; it can be a text tokenizer (--text), or what a recipe starts from")
    if (Path(name) / "config.json").is_file():
        return Path(name)
    for family in ZOO_FOLDERS:
        if str(name) in zoo_entries(family):
            return zoo_root(family) / str(name)
    if isinstance(name, str) and name.count("/") == 1 and not Path(name).exists():
        return download(name)
    if Path(name).exists():
        raise HubError(f"{name}: has no config.json, so it is not a saved tokenizer or model")
    known = [entry for family in ZOO_FOLDERS for entry in zoo_entries(family)]
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the zoo holds: {', '.join(known) or 'nothing'}"
    raise HubError(f"{name}: no such path or zoo entry; {hint}")


def download(repo_id: str, patterns: Sequence[str] | None = None) -> Path:
    """The folder of a Hub id, fetched where it is not here yet.

    Args:
        repo_id: ``owner/name``.
        patterns: of the files that are wanted; None wants all.

    Raises:
        HubError: an extra is not installed, or it cannot be fetched.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubError(f"{repo_id}: looks like a Hub id, and that needs an extra: pip install 'mmtp[hf]'") from error
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=None if patterns is None else list(patterns)))
    except Exception as error:
        raise HubError(f"{repo_id}: cannot be fetched from the Hub ({type(error).__name__})") from error


def from_pretrained(name: str | Path, **runtime: Any) -> Any:
    """Loads a tokenizer or model, in evaluation mode and float32.

    Args:
        name: a zoo entry (``"image-fsq-f8"``), a folder, or a Hub id (``"owner/name"``); or a language model of transformers
            (``"transformers:NAME"``), for its text tokenizer.
        runtime: passed to the class's constructor.
    """
    if is_language_model(name):
        return REGISTRY.resolve("tokenizer", "text").from_language_model(str(name))
    folder = find(name)
    config = read_config(folder)
    cls: Any = config.owner()
    built = cls.load_files(config, folder) if hasattr(cls, "load_files") else config.build(**runtime)
    if (state := load_weights(folder)) is not None:
        try:
            built.load_state_dict(_with_shared(state, built.state_dict()))
        except RuntimeError as error:
            raise HubError(f"{folder}: weights do not fit config.json: {str(error).splitlines()[-1].strip()}") from error
    return built.eval() if hasattr(built, "eval") else built


def read_config(name: str | Path) -> Any:
    """The configuration alone of what :func:`from_pretrained` would load."""
    path = find(name) / "config.json"
    data = load_file(path)
    if "model_type" in data and "type" not in data:
        raise HubError(f"{name}: is a model in transformers' format; where mmtp reads such models, write {LIBRARY}{name}")
    family = data.get("family", "tokenizer")
    return build_config(family, {k: v for k, v in data.items() if k not in ("family", "mmtp")}, str(path))


def save_pretrained(obj: Pretrained, folder: str | Path, *, dtype: str | None = None) -> Path:
    """Writes configuration, weights and own files. Card, recipe and golden file are written by whoever made them.

    Args:
        obj: a tokenizer or model.
        folder: created where it does not exist.
        dtype: ``"float16"`` or ``"bfloat16"`` to store floating-point weights in half the bytes.
    """
    from mmtp import __version__

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family, _ = REGISTRY.name_of(type(obj))
    record = {"mmtp": __version__, "family": family, **obj.config.to_dict()}
    write_text(folder / "config.json", json.dumps(record, indent=2) + "\n")
    if hasattr(obj, "save_files"):
        obj.save_files(folder)
    if state := obj.state_dict():
        save_weights(state, folder, dtype)
    return folder


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Uploads a saved folder as it stands; returns its address. Needs the ``hf`` extra."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubError("pushing to the Hub needs an extra: pip install 'mmtp[hf]'") from error
    api = huggingface_hub.HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=str(find(folder))))


def fingerprint(config: Config, state: Mapping[str, "Tensor"], files: Mapping[str, bytes] | None = None) -> str:
    """Hash of everything that decides what a tokenizer gives: configuration, weights, files of its own."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().float().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    for name, content in sorted((files or {}).items()):
        digest.update(name.encode() + content)
    return digest.hexdigest()[:16]


def save_weights(state: Mapping[str, "Tensor"], folder: Path, dtype: str | None = None) -> None:
    """Writes a state dict as safetensors, in files of at most 15 MiB. Shared tensors are written once."""
    import torch
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    seen: set[int] = set()
    size = 0
    for name, tensor in state.items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        stored = tensor.detach().cpu()
        if dtype is not None and stored.is_floating_point():
            stored = stored.to(getattr(torch, dtype))
        bytes_ = stored.numel() * stored.element_size()
        if shards[-1] and size + bytes_ > MAX_SHARD_BYTES - 2**16:
            shards.append({})
            size = 0
        shards[-1][name] = stored.contiguous()
        size += bytes_
    for stale in folder.glob("model*.safetensors"):
        stale.unlink()
    for i, shard in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / f"{name}.tmp")
        os.replace(folder / f"{name}.tmp", folder / name)


def load_weights(folder: Path) -> "dict[str, Tensor] | None":
    """Reads the weights of a folder in float32, or None where it keeps none."""
    from safetensors.torch import load_file as load_safetensors

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        return None
    state: dict[str, Tensor] = {}
    for path in files:
        try:
            state |= load_safetensors(path)
        except Exception as error:  # safetensors raises its own type, without a stable name
            raise HubError(f"{path}: is damaged ({error}); fetch it again") from error
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def _with_shared(state: "dict[str, Tensor]", own: Mapping[str, "Tensor"]) -> "dict[str, Tensor]":
    """The saved state, with the names that were left out because they share a tensor that was written under another name."""
    written = {own[name].data_ptr(): tensor for name, tensor in state.items() if name in own and own[name].numel()}
    shared = {name: written[tensor.data_ptr()] for name, tensor in own.items() if name not in state and tensor.data_ptr() in written}
    return state | shared


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def iter_zoo() -> Iterator[tuple[str, Path]]:
    """Every zoo entry as (family, folder)."""
    for family in ZOO_FOLDERS:
        for name in zoo_entries(family):
            yield family, zoo_root(family) / name
