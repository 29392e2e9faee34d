"""Answers of a wanted form: JSON that a schema describes, text that a regular expression matches, one of some choices.

A constraint is compiled once for the ids of a text tokenizer by llguidance, a parser of bytes that tells which tokens may come next.
A request follows it beside the grammar: at places of text, those ids are legal that both allow. When the answer may end, so may the
turn, and when nothing more can follow, nothing but its end is legal. Since target and draft are chosen among the same ids, speculation
stays what it is: the stream of plain decoding, sooner.

Bytes about which there is no choice (``{"colour": "`` in an object of one key) are written in the tokenizer's own way: one token is
legal, and needs neither logits nor a draft head.
"""

import json
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from mmtp.decode.stats import Generation
from mmtp.stream.grammar import GrammarError, GrammarState, Triple
from mmtp.stream.vocab import Special, VocabLayout
from mmtp.types import MmtpError

JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as ``json.dumps`` writes it. Free whitespace is where a small model loses itself."""


class ConstraintError(MmtpError):
    """A constraint that cannot be compiled, or that no text meets; says why."""


class Form(TypedDict, total=False):
    """What a text answer must look like; one of these at most (see :class:`Constrainer`).

    Attributes:
        json_schema: JSON that this schema, or its text, describes.
        regex: text that this regular expression matches as a whole.
        choices: one of these texts.
    """

    json_schema: Mapping[str, Any] | str
    regex: str
    choices: Sequence[str]


class Constrainer:
    """Compiles constraints for the text ids of a vocabulary.

    Args:
        layout: the vocabulary.
        token_bytes: what each local text id stands for; ids that are left out (control tokens) are part of no answer.
        encode: bytes to local ids, as the tokenizer writes them.

    Raises:
        ConstraintError: llguidance is not installed, or the vocabulary has no text.
    """

    def __init__(self, layout: VocabLayout, token_bytes: Mapping[int, bytes], encode: Callable[[bytes], Sequence[int]]) -> None:
        if layout.text is None:
            raise ConstraintError("this vocabulary has no text, so there is nothing to constrain")
        try:
            import llguidance
        except ImportError as error:
            raise ConstraintError("constrained answers need an extra: pip install 'mmtp[constrain]'") from error
        self.layout = layout
        self._matcher = llguidance.LLMatcher
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(layout.text.size, token_bytes, encode)))

    def json_schema(self, schema: Mapping[str, Any] | str) -> "Constraint":
        """JSON that a schema describes, spaced as ``json.dumps`` does.

        Args:
            schema: the schema, or its text.
        """
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            grammar = self._matcher.grammar_from_json_schema(json.dumps(json.loads(text)), overrides=JSON_STYLE)
        except (TypeError, ValueError) as error:
            raise ConstraintError(f"JSON schema: is none ({_one_line(str(error))})") from error
        return self._compile("JSON schema", grammar)

    def regex(self, pattern: str) -> "Constraint":
        """Text that a regular expression matches from its first character to its last.

        Args:
            pattern: in the syntax of Rust's ``regex``: as Python's, without backreferences and look-around.
        """
        return self._compile(f"regex {reprlib.repr(pattern)}", self._matcher.grammar_from_regex(_encodable(pattern)))

    def choices(self, options: Iterable[str]) -> "Constraint":
        """One of some texts."""
        options = list(options)
        if not options:
            raise ConstraintError("choices: at least one is wanted")
        pattern = "|".join(f"(?:{re.escape(_encodable(option))})" for option in options)
        return self._compile(f"choices {reprlib.repr(options)}", self._matcher.grammar_from_regex(pattern))

    def _compile(self, name: str, grammar: str) -> "Constraint":
        constraint = Constraint(name, self.layout, self._matcher(self._tokenizer, grammar, log_level=0))
        if failure := constraint.follow().look(int(Special.END))[1]:
            raise ConstraintError(failure)
        return constraint


class _Vocabulary:
    """A text tokenizer as llguidance takes it: its ids, then one that stands for the end of the answer."""

    bos_token_id = None

    def __init__(self, size: int, token_bytes: Mapping[int, bytes], encode: Callable[[bytes], Sequence[int]]) -> None:
        self.eos_token_id = size
        self.tokens = [*(token_bytes.get(i, b"") for i in range(size)), b"<end>"]
        self.special_token_ids = [*(i for i in range(size) if i not in token_bytes), size]
        self._encode = encode

    def __call__(self, data: bytes) -> list[int]:
        return list(self._encode(bytes(data)))


class Constraint:
    """A compiled constraint, which any number of requests may follow.

    Args:
        name: what messages call it.
        layout: whose ids it knows.
        matcher: llguidance's, at the start.
    """

    def __init__(self, name: str, layout: VocabLayout, matcher: Any) -> None:
        self.name, self.layout = name, layout
        self._matcher = matcher

    def follow(self) -> "Follower":
        """A request's way through the constraint, at its start."""
        return Follower(self.name, self.layout, self._matcher.deep_copy)


class Step:
    """An answer so far, as a list linked from its end: one more token costs the same however long it is."""

    __slots__ = ("before", "length", "token")

    def __init__(self, before: "Step | None", token: int) -> None:
        self.before, self.token = before, token
        self.length = 1 if before is None else before.length + 1


class Follower:
    """One parser for a request and all its drafts: it goes back as far as two answers differ, and on from there.

    Args:
        name: of the constraint.
        layout: the vocabulary.
        start: gives a parser that has read nothing.
    """

    def __init__(self, name: str, layout: VocabLayout, start: Callable[[], Any]) -> None:
        self._name, self._start = name, start
        self._text = layout.text_range
        self._matcher = start()
        self._read: list[Step] = []

    def move(self, step: Step | None) -> None:
        """Has read just this answer."""
        if self._matcher.is_error():  # for good: a draft led beyond what llguidance undertakes to parse
            self._matcher, self._read = self._start(), []
        wanted: list[Step] = []
        while step is not None and not (step.length <= len(self._read) and self._read[step.length - 1] is step):
            wanted.append(step)
            step = step.before
        kept = 0 if step is None else step.length
        if kept < len(self._read):
            self._matcher.rollback(len(self._read) - kept)
            del self._read[kept:]
        for one in reversed(wanted):
            self._matcher.consume_token(one.token - self._text[0])
            self._read.append(one)

    def look(self, closer: int) -> tuple[Bool[Tensor, " ids"], str]:
        """Which vocabulary ids, up to the last of text, may come next, and why the answer cannot go on (empty where it can).

        Args:
            closer: the id that ends the answer, legal where that may end.
        """
        first, last = self._text
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        legal = torch.zeros(last, dtype=torch.bool)
        legal[first:last] = torch.from_numpy(bits[: last - first].astype(bool))
        legal[closer] = self._matcher.is_accepting()
        if legal.any() and not self._matcher.is_error():
            return legal, ""
        why = _one_line(self._matcher.get_error())
        return legal, f"{self._name}: {'no text meets it' if not why or why.startswith('NoExtension') else why}"


class AnswerState(GrammarState):
    """Where a constrained answer stands: the grammar's state, and what the constraint makes of the places of text.

    Args:
        state: the grammar's, where text may stand.
        follower: of the request.
        step: the answer so far.

    Attributes:
        legal: which vocabulary ids, up to the last of text, may come next.
        forced: the one that may, where there is only one.
        failure: why the answer cannot go on; empty where it can.
    """

    __slots__ = ("_answer", "_closed", "_closer", "_follower", "failure", "forced", "legal")

    def __init__(self, state: GrammarState, follower: Follower) -> None:
        for name in GrammarState.__slots__:
            setattr(self, name, getattr(state, name))
        self._closer = int(Special.END if state.slot == self._grammar.turn else Special.EOS)
        self._follower = follower
        self._closed = False
        self._answer: Step | None = None
        self._look()

    def copy(self) -> "AnswerState":
        new = AnswerState.__new__(AnswerState)
        for name in GrammarState.__slots__ + AnswerState.__slots__:
            setattr(new, name, getattr(self, name))
        return new

    @property
    def done(self) -> bool:
        """Whether the answer has ended, well or not."""
        return self._closed or bool(self.failure)

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        return not self.done and token < len(self.legal) and bool(self.legal[token])

    def push(self, token: int) -> Triple:
        """Takes the next token and returns the position at which it stands.

        Raises:
            GrammarError: the constraint or the grammar does not allow it; the state is as before.
        """
        if not self.allows(token):
            raise GrammarError(self.offset, "what the constraint allows", self._grammar.describe(token))
        position = super().push(token)
        self._closed = token == self._closer
        if not self._closed:
            self._answer = Step(self._answer, token)
            self._look()
        return position

    def _look(self) -> None:
        self._follower.move(self._answer)
        self.legal, self.failure = self._follower.look(self._closer)
        legal = self.legal.nonzero()
        self.forced = int(legal) if len(legal) == 1 else None


def check_form(generation: Generation, constraint: Constraint | None, what: str) -> None:
    """Refuses an answer that lacks the end of its form.

    Raises:
        ConstraintError: names what was asked.
    """
    if constraint is not None and generation.failure:
        raise ConstraintError(f"{what}: {generation.failure}")
    if constraint is not None and generation.cut:
        raise ConstraintError(f"{what}: {len(generation.new_tokens)} tokens do not complete {constraint.name}; raise max_new_tokens")


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConstraintError(f"{reprlib.repr(text)}: holds half a surrogate pair, which no answer can hold") from error
    return text


def _one_line(message: str) -> str:
    """What an error of llguidance says, without the drawing of where: its last ``error:``, or else its first line."""
    errors = re.findall(r"^error: (.*)$", message, flags=re.MULTILINE)
    return errors[-1] if errors else message.partition("\n")[0]
