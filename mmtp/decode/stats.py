"""What decoding gives, and what it cost."""

from collections import Counter
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor


@dataclass
class DecodeStats:
    """What a generation cost. Keys are (modality of the drafted token, offset from 1); drafts of the row above count as ``BELOW``,
    those of the pass before as ``CARRIED`` or ``NEARBY``.

    Attributes:
        per_pass: tokens that each pass of the backbone produced, the prompt's first.
        seconds: wall-clock time, from submission to end.
        waited: seconds of it until its prompt began to be read.
        first: seconds of it until the first tokens were chosen, the prompt being read.
        drafting: seconds of it in which drafts were made, for all rows of the batch.
        drafted: drafts proposed.
        accepted: drafts that stood, with all drafts before them.
    """

    per_pass: list[int] = field(default_factory=list)
    seconds: float = 0.0
    waited: float = 0.0
    first: float = 0.0
    drafting: float = 0.0
    drafted: Counter[tuple[str, int]] = field(default_factory=Counter)
    accepted: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def generated(self) -> int:
        """Tokens produced."""
        return sum(self.per_pass)

    @property
    def passes(self) -> int:
        """Passes of the backbone that produced them."""
        return len(self.per_pass)

    @property
    def tokens_per_pass(self) -> float:
        return self.generated / max(1, self.passes)


@dataclass(frozen=True)
class Generation:
    """A finished row.

    Attributes:
        tokens: the prompt and what follows it.
        prompt_length: where the new tokens begin.
        stats: of this row.
        vectors: those of the new ``<feature>`` tokens, in order; None where there are none.
        cut: whether the limit ended it, in the midst of what it wrote.
        failure: why a constrained answer could not go on; empty where it could.
    """

    tokens: list[int]
    prompt_length: int
    stats: DecodeStats
    vectors: Float[Tensor, "n c"] | None = None
    cut: bool = False
    failure: str = ""

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_length :]
