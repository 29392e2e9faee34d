"""Drafts from a smaller model over the same vocabulary, as speculative decoding began (Leviathan et al. 2023; Chen et al. 2023)."""

from itertools import takewhile

from jaxtyping import Float
from torch import Tensor

from mmtp.decode.drafts import Verifier
from mmtp.decode.engine import Engine
from mmtp.decode.rows import Choice, Lane, Row
from mmtp.decode.step import Step


class ModelDrafts:
    """Drafts by another model, token by token. It reads placeholders where vectors stand, for they are in the other's width.

    Args:
        model: in evaluation mode, over the vocabulary of the model that it drafts for.
        max_drafts: tokens to propose at most.
    """

    def __init__(self, model: Step, max_drafts: int = 4) -> None:
        if max_drafts < 1:
            raise ValueError(f"max_drafts {max_drafts}: at least 1 is wanted")
        self.engine, self.max_drafts = Engine(model), max_drafts

    def length(self, model: Step) -> int:
        """As of any :class:`mmtp.decode.drafts.Drafts`.

        Raises:
            VocabMismatch: the two models differ in their vocabularies.
        """
        model.config.layout.check_same(self.engine.model.config.layout, "the drafting model")
        return self.max_drafts

    def begin(self, engine: Verifier, num_lanes: int, capacity: int) -> "_ModelDrafter":
        return _ModelDrafter(self.engine, self.max_drafts, num_lanes, capacity)


class _ModelDrafter:
    """Keeps what the model has read of every lane, drafts included; those that stood are not read again."""

    def __init__(self, engine: Engine, max_drafts: int, num_lanes: int, capacity: int) -> None:
        self.engine, self.max_drafts = engine, max_drafts
        # A pass is as wide as the longest unread end, and begins behind the longest lane.
        self.cache = engine.new_cache(engine.model.config.backbone.num_caches, num_lanes, capacity + 2 * (max_drafts + 1))
        self._begun = [0] * num_lanes  # length of each lane when it was drafted last
        self._drafts: list[list[int]] = [[] for _ in range(num_lanes)]

    def restart(self, lane: int) -> None:
        self.cache.lengths[lane] = self._begun[lane] = 0

    def propose(self, rows: list[Row], lanes: list[Lane], hidden: Float[Tensor, "b s d"], counts: list[int], least: int) -> None:
        for row in rows:
            if row.branch is not None and row.branch.fresh:
                self.restart(row.branch.index)
        for i, lane in enumerate(lanes):
            stood = self._begun[i] + _common(self._drafts[i], lane.tokens[self._begun[i] :])
            self.cache.lengths[i] = min(self.cache.lengths[i], stood)
        open_rows = [row for row in rows if not row.done]
        for k in range(1, self.max_drafts + 1):
            open_rows = [row for row in open_rows if row.wants(k)]
            if not open_rows:
                break
            states, ends = self._pass(open_rows, lanes, least)
            wanted = []
            for row in open_rows:
                state, branch = row.draft_states[-1], row.branch
                guide = branch.guide(k - 1, ends[branch.index]) if branch is not None and ends[branch.index] >= 0 else None
                place, weight = len(row.tokens) + k - 1, row.weight(state)
                wanted.append(Choice(row, ends[row.index], state.slot, place, guide, weight, answer=row.answer(-1)))
            proposed = self.engine.propose(self.engine.model.backbone.norm, states, wanted, least > 0)
            open_rows = [row for row, draft in zip(open_rows, proposed, strict=True) if row.take_draft(draft, k)]
        self._begun, self._drafts = [len(lane.tokens) for lane in lanes], [lane.drafts for lane in lanes]

    def _pass(self, open_rows: list[Row], lanes: list[Lane], least: int) -> tuple[Float[Tensor, "b s d"], list[int]]:
        """Reads what some rows, and their branches within spans, have not read; the column of each lane's last state, -1 for none."""
        model, lengths, tensor = self.engine.model, self.cache.lengths, self.engine.tensor
        reading = {lane.index for row in open_rows for lane in row.lanes if lane is row or lane.draft_states[-1].in_span}
        windows = [(lane.tokens + lane.drafts)[lengths[lane.index] :] if lane.index in reading else [] for lane in lanes]
        places = [(lane.positions + lane.draft_positions)[lengths[lane.index] :] for lane in lanes]
        longest = max(least, *map(len, windows))
        mask = self.cache.begin(longest)
        tokens = tensor([w + [0] * (longest - len(w)) for w in windows])
        positions = tensor([(p + [(0, 0, 0)] * longest)[:longest] for p in places])
        slots = [lane.window_slots(lengths[lane.index], len(window)) for lane, window in zip(lanes, windows, strict=True)]
        states = model.extend(model.embed(tokens), positions, mask, self.cache.layers, slots)
        self.cache.commit([len(w) for w in windows])
        return states, [len(w) - 1 for w in windows]


def _common(drafts: list[int], tokens: list[int]) -> int:
    """How many drafts stood."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(drafts, tokens, strict=False)))
