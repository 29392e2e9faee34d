"""Text tokenizer over Hugging Face ``tokenizers``: any string and any bytes, given back exactly."""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from mmtp.config import Config as BaseConfig
from mmtp.hf import open_checkpoint
from mmtp.hub import fingerprint, write_text
from mmtp.types import Codes, MmtpError, Modality, TokenizerSpec

PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How text is cut before pairs are merged: cl100k's pattern with digits one by one (as in Qwen2)."""


_WORDS = re.compile(r"\s*\S+|\s+")
_PLAIN = "The quick,  brown\n\tFox (0123)."


class TextTokenizerError(MmtpError):
    """A tokenizer.json that cannot serve, or an id that is none of its tokens."""


class TextTokenizer:
    """Text to ids and back.

    Strings may hold lone surrogates (they travel as their three bytes), and bytes need not be UTF-8: runs that are not become one
    token per byte. Control tokens of the file (``<|im_end|>``) are never produced from text that merely spells them. Byte-level files may
    lack bytes that did not occur in what they were trained on (SmolLM2's lacks 21): these get ids behind the file's.

    Args:
        config: the name of the file.
        backend: the Hugging Face tokenizer; byte-level, or with a token for each of the 256 bytes.
        content: the file as it was read. It decides the fingerprint and is what is saved, because another version of the
            library may write the same tokenizer otherwise.

    Attributes:
        file_size: ids of the file.

    Raises:
        TextTokenizerError: bytes are missing, so that some text could not be given back, or plain text is changed, so that it could be
            given back byte by byte only.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BaseConfig):
        """``file``: name of the Hugging Face file within the folder."""

        file: str = "tokenizer.json"

    def __init__(self, config: Config, backend: Tokenizer, content: str | None = None) -> None:
        self.config = config
        self._backend = backend
        self._content = content or json.dumps(json.loads(backend.to_str()), ensure_ascii=False, indent=0) + "\n"
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._bytes = bytes_of_tokens(backend)
        self._ids = ids_of_bytes(backend)
        self.file_size = max(self._bytes) + 1
        missing = [byte for byte in range(256) if bytes([byte]) not in self._ids]
        if missing and not _is_byte_level(json.loads(backend.to_str())):
            raise TextTokenizerError(
                f"{config.file}: has no token for {len(missing)} of the 256 bytes (the first is 0x{missing[0]:02x}), so some "
                "text could not be given back; use a byte-level BPE, or one with byte fallback"
            )
        for i, byte in enumerate(missing, self.file_size):
            self._bytes[i] = bytes([byte])
            self._ids[bytes([byte])] = i
        if self._merged(_PLAIN) is None:
            raise TextTokenizerError(
                f"{config.file}: changes plain text (case, spaces, line breaks), so that it could not be given back; use a tokenizer "
                "without such a normalizer"
            )
        self._spec = TokenizerSpec(
            modality=Modality.TEXT,
            codebook_sizes=(max(self._bytes) + 1,),
            fingerprint=fingerprint(config, {}, {config.file: self._content.encode()}),
        )

    @classmethod
    def from_file(cls, path: str | Path) -> "TextTokenizer":
        """Reads any ``tokenizer.json``.

        Raises:
            TextTokenizerError: the file is missing, damaged, or cannot represent every byte.
        """
        path = Path(path)
        try:
            content = path.read_text(encoding="utf-8")
        except OSError as error:
            raise TextTokenizerError(f"{path}: cannot be read ({error.strerror})") from error
        return cls._of(content, path.name, str(path))

    @classmethod
    def from_language_model(cls, name: str) -> "TextTokenizer":
        """The tokenizer of a language model in transformers' format (:mod:`mmtp.hf`).

        Raises:
            HubError: there is no such model.
            TextTokenizerError: its tokenizer cannot represent every byte.
        """
        try:
            return cls._of(open_checkpoint(name).tokenizer, cls.Config.file, cls.Config.file)
        except TextTokenizerError as error:
            raise TextTokenizerError(f"{name}: {error}") from error

    @classmethod
    def _of(cls, content: str, file: str, where: str) -> "TextTokenizer":
        try:
            backend = Tokenizer.from_str(content)
        except Exception as error:  # tokenizers raises bare Exception
            raise TextTokenizerError(f"{where}: is not a Hugging Face tokenizer ({str(error).splitlines()[0]})") from error
        return cls(cls.Config(file=file), backend, content)

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> "TextTokenizer":
        """A byte-level BPE of ``size`` entries: the 256 bytes, then merges learned from ``texts``. No control tokens."""
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
        )
        backend.train_from_iterator((_printable(text) for text in texts), trainer)
        return cls(cls.Config(), backend)

    @property
    def spec(self) -> TokenizerSpec:
        return self._spec

    @property
    def vocabulary(self) -> Mapping[bytes, int]:
        """The id of every byte string that is a token; control tokens are left out."""
        return self._ids

    @property
    def token_bytes(self) -> dict[int, bytes]:
        """The same from the ids' side: what every id stands for that a text becomes."""
        return {id_: data for data, id_ in self._ids.items()}

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a text is its number of tokens, which only encoding tells."""
        (count,) = shape
        return (count,)

    def num_tokens(self, shape: Sequence[int]) -> int:
        return self.grid(shape)[0]

    def encode_text(self, text: str) -> list[int]:
        """Ids of a string; lone surrogates are kept."""
        return self.encode_bytes(text.encode("utf-8", "surrogatepass"))

    def decode_text(self, ids: Iterable[int]) -> str:
        """The string of ids. Bytes that are no text (a model may write such) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", _HANDLER)

    def incremental_decoder(self) -> codecs.IncrementalDecoder:
        """Bytes that come in pieces to characters, as soon as these are complete; together what :meth:`decode_text` gives."""
        return codecs.getincrementaldecoder("utf-8")(_HANDLER)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes; :meth:`decode_bytes` gives exactly these bytes back."""
        ids: list[int] = []
        while data:
            try:
                text, invalid, data = data.decode("utf-8"), b"", b""
            except UnicodeDecodeError as error:
                text, invalid, data = data[: error.start].decode("utf-8"), data[error.start : error.end], data[error.end :]
            if text:
                ids += self._encode_valid(text)
            ids += [self._ids[bytes([byte])] for byte in invalid]
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids.

        Raises:
            TextTokenizerError: an id is none of this tokenizer's.
        """
        return b"".join(self.pieces(ids))

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes of every id.

        Raises:
            TextTokenizerError: an id is none of this tokenizer's.
        """
        try:
            return [self._bytes[int(i)] for i in ids]
        except KeyError as error:
            raise TextTokenizerError(f"{self.config.file}: id {error.args[0]} is no token; they go to {max(self._bytes)}") from error

    def encode(self, media: Sequence[str]) -> Codes:
        """Ids of a batch of strings, ``[b, 1, n]``."""
        rows = [self.encode_text(text) for text in media]
        out = torch.zeros((len(rows), 1, max(map(len, rows), default=0)), dtype=torch.long)
        for i, row in enumerate(rows):
            out[i, 0, : len(row)] = torch.tensor(row, dtype=torch.long)
        return Codes(out, torch.tensor([len(row) for row in rows], dtype=torch.long)[:, None])

    def decode(self, codes: Codes) -> list[str]:
        """The strings of a batch of ids.

        Raises:
            TextTokenizerError: several codebooks, or an id that is none of this tokenizer's.
        """
        if codes.ids.shape[1] != 1:
            raise TextTokenizerError(f"codes of {codes.ids.shape[1]} codebooks given, text has 1")
        return [self.decode_text(codes.item(i)[0].tolist()) for i in range(len(codes))]

    @property
    def content(self) -> str:
        """The Hugging Face file, as it was read."""
        return self._content

    def save_files(self, folder: Path) -> None:
        """Writes the Hugging Face file, as ``from_file`` and other libraries read it."""
        write_text(folder / self.config.file, self._content)

    @classmethod
    def load_files(cls, config: Config, folder: Path) -> "TextTokenizer":
        return cls.from_file(folder / config.file)

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: everything stands in the Hugging Face file."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
        """Accepts the empty state that :meth:`state_dict` gives."""
        if state_dict:
            raise TextTokenizerError(f"{self.config.file}: a text tokenizer has no weights, {len(state_dict)} tensors given")

    def _encode_valid(self, text: str) -> list[int]:
        """Ids of a string without surrogates. Files of other makers may normalise; words that they would change go byte by byte."""
        ids = self._merged(text)
        if ids is not None:
            return ids
        words = _WORDS.findall(text)
        if len(words) > 1:
            return [i for word in words for i in self._encode_valid(word)]
        return [self._ids[bytes([byte])] for byte in text.encode()]

    def _merged(self, text: str) -> list[int] | None:
        """Ids as the file's rules give them; None where they do not stand for this very text."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        data = text.encode()
        given = b"".join([self._bytes.get(i, b"") for i in ids])
        if given == data:
            return ids
        if given == b" " + data:  # the space that SentencePiece puts before a text
            first = self._bytes[ids[0]][1:]
            return [*self._ids_of(first), *ids[1:]]
        return None

    def _ids_of(self, data: bytes) -> list[int]:
        return [self._ids[data]] if data in self._ids else [self._ids[bytes([byte])] for byte in data]


def bytes_of_tokens(backend: Tokenizer) -> dict[int, bytes]:
    """What every id stands for, in order of ids. Control tokens stand for their own name."""
    description = json.loads(backend.to_str())
    added = {token["id"]: token["content"].encode() for token in description["added_tokens"]}
    byte_level = _is_byte_level(description)
    of_char = {char: byte for byte, char in _byte_chars().items()}
    out: dict[int, bytes] = {}
    for token, id_ in sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1]):
        if id_ in added:
            out[id_] = added[id_]
        elif byte_level and all(char in of_char for char in token):
            out[id_] = bytes(of_char[char] for char in token)
        elif match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
            out[id_] = bytes.fromhex(match[1])
        else:
            out[id_] = token.replace("▁", " ").encode()
    return out


def ids_of_bytes(backend: Tokenizer) -> dict[bytes, int]:
    """The id of every byte string that is a token.

    Control tokens are left out, for text must not become one; of equal tokens the last is the one that is no byte fallback.
    """
    control = {token["id"] for token in json.loads(backend.to_str())["added_tokens"]}
    return {data: id_ for id_, data in bytes_of_tokens(backend).items() if id_ not in control}


def _is_byte_level(description: Mapping[str, Any]) -> bool:
    """Whether characters of the tokens stand for bytes, by what is in a ``tokenizer.json``."""
    return '"ByteLevel"' in json.dumps([description["pre_tokenizer"], description["decoder"]])


def _byte_chars() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (Radford et al. 2019, GPT-2's ``bytes_to_unicode``)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def _printable(text: str) -> str:
    """Without lone surrogates, which ``tokenizers`` cannot take in."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _surrogate_or_replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    piece = error.object[error.start : error.start + 3]
    try:
        return piece.decode("utf-8", "surrogatepass"), error.start + 3
    except UnicodeDecodeError:
        return "\ufffd", error.end


_HANDLER = "mmtp-surrogate-or-replace"
codecs.register_error(_HANDLER, _surrogate_or_replace)
