from collections import Counter
from dataclasses import replace

import pytest

from mmtp.decode.sample import Sampling
from mmtp.decode.stats import DecodeStats, Generation
from mmtp.eval.decoding import DecodingResult, Prompt, compare
from mmtp.eval.report import render
from mmtp.models.heads.base import BELOW


class Scripted:
    """Answers by a rule, at a speed that drifts, and remembers how it was called."""

    def __init__(self, unequal_at: int | None = None) -> None:
        self.calls: list[tuple[int, float, int, bool]] = []
        self.batches: list[tuple[int, set[int], int]] = []
        self.unequal_at = unequal_at

    def generate(self, prefix, sampling, max_new_tokens, speculative, stop):
        self.calls.append((prefix[-1], sampling.temperature, sampling.seed, speculative))
        new = [(7 * i + sampling.seed) % 50 for i in range(max_new_tokens)]
        if speculative and sampling.seed == self.unequal_at:
            new[-1] += 1
        drift = 1.2 ** len(self.calls)  # an ever slower machine must not decide the ratio
        stats = DecodeStats(
            per_pass=[2] * (len(new) // 2) if speculative else [1] * len(new),
            seconds=len(new) * 0.01 * drift / (2 if speculative else 1),
            drafting=len(new) * 0.001 * drift if speculative else 0.0,
            drafted=Counter({("image", 1): 10, ("image", 2): 5, ("image", BELOW): 2, ("text", 1): 4}) if speculative else Counter(),
            accepted=Counter({("image", 1): 8, ("image", 2): 1, ("image", BELOW): 1, ("text", 1): 4}) if speculative else Counter(),
        )
        return Generation(list(prefix) + new, len(prefix), stats)

    def generate_batch(self, prefixes, samplings, max_new_tokens, speculative, stop, *, max_lanes):
        self.batches.append((len(prefixes), {prefix[0] for prefix in prefixes}, max_lanes))
        rows = [self.generate(p, s, max_new_tokens, speculative, stop) for p, s in zip(prefixes, samplings, strict=True)]
        return [replace(row, stats=replace(row.stats, seconds=rows[-1].stats.seconds)) for row in rows]


PROMPTS = [Prompt("picture", [1, i], 64) for i in range(6)] + [Prompt("answer", [2, i], 4) for i in range(2)]


def test_ways_alternate_and_both_see_the_same_settings():
    engine = Scripted()
    compare(engine, PROMPTS, Sampling(seed=100), temperatures=(0.0, 1.0), repeats=2)
    calls = engine.calls[2:]  # after the warm-up
    assert len(calls) == len(PROMPTS) * 2 * 4
    for i in range(0, len(calls), 4):
        group = calls[i : i + 4]
        assert len({call[:3] for call in group}) == 1
        ways = [call[3] for call in group]
        assert ways in ([False, True] * 2, [True, False] * 2)
    assert {calls[i][3] for i in range(0, len(calls), 4)} == {False, True}
    assert [calls[i][2] for i in range(0, len(calls), 8)] == list(range(100, 108))


def test_result_counts_equality_speed_and_acceptance():
    told = []
    result = compare(Scripted(), PROMPTS, temperatures=(1.0,), progress=lambda *state: told.append(state))
    assert told == [(i + 1, len(PROMPTS)) for i in range(len(PROMPTS))] and result.all_equal
    assert result.tokens_per_pass == pytest.approx(2.0)
    assert result.speedup == pytest.approx(2.0, rel=0.25)  # drift of 1.2 per call cancels in the median over both orders
    assert result.acceptance() == {("image", BELOW): (8, 16), ("image", 1): (64, 80), ("image", 2): (8, 40), ("text", 1): (32, 32)}
    assert [len(p.tokens) for p in result.of("answer").pairs] == [4, 4]

    table = result.table()
    assert [row[0] for row in table.rows] == ["picture", "answer"]
    assert table.rows[0][table.columns.index("equal")] == "6 of 6"
    drafts, verification = (float(table.rows[0][table.columns.index(name)]) for name in ("drafts", "verification"))
    assert drafts == pytest.approx(0.2, rel=0.25) and drafts + verification == pytest.approx(1.0, rel=0.25)
    assert result.acceptance_table().rows[:2] == [
        ["image", "below", "vertical", 16, 8, "50.0 %", "yes"],
        ["image", "+1", "horizontal", 80, 64, "80.0 %", "yes"],
    ]
    assert "svg" in result.acceptance_figure("c").svg
    plain = result.to_dict()
    assert [found["offset"] for found in plain["acceptance"]] == ["below", "+1", "+2", "+1"]
    assert [found["direction"] for found in plain["acceptance"]] == ["vertical", "horizontal", "horizontal", "ahead"]
    assert all(found["equal"] for found in plain["acceptance"])
    assert plain["all_equal"] and [g["kind"] for g in plain["groups"]] == ["picture", "answer"]


def test_one_differing_token_shows():
    result = compare(Scripted(unequal_at=3), PROMPTS, temperatures=(0.0, 1.0))
    assert not result.all_equal
    assert sum(not p.equal for p in result.pairs) == 2
    assert result.of("answer").all_equal and not result.of("picture").all_equal
    assert {row[-1] for row in result.acceptance_table().rows} == {"no: 14 of 16"}
    page = render("decoding", result.sections())
    assert "14 of 16" in page and "no: 7 of 8" in page and page.count("<svg") == 2 and "vertical" in page


def test_nothing_asked_gives_nothing():
    result = compare(Scripted(), [])
    assert result == DecodingResult([]) and result.speedup == 0.0 and result.tokens_per_pass == 0.0


def test_time_that_is_up_ends_after_some_prompts_of_both_orders():
    assert len(compare(Scripted(), PROMPTS, max_seconds=0.0).pairs) == 4


def test_prompts_of_a_kind_are_decoded_together():
    engine = Scripted()
    result = compare(engine, PROMPTS, temperatures=(1.0,), batch=2)
    assert engine.batches == [(6, {1}, 2), (6, {1}, 2), (2, {2}, 2), (2, {2}, 2)]
    assert result.all_equal and [len(result.of(kind).pairs) for kind in ("picture", "answer")] == [6, 2]
    seeds = {call[:3] for call in engine.calls[2:]}
    assert len(seeds) == len(PROMPTS)  # each prompt has a seed of its own, the same in both ways


def test_of_a_batch_the_time_of_all_counts():
    class Batch(Scripted):
        """Rows that end one after the other, with drafts twice as soon; they wait for room, and draft half of the time."""

        def generate_batch(self, prefixes, samplings, max_new_tokens, speculative, stop, *, max_lanes):
            rows = [self.generate(p, s, max_new_tokens, speculative, stop) for p, s in zip(prefixes, samplings, strict=True)]
            times = [(3.0 + i) / (2 if speculative else 1) for i in range(len(rows))]
            return [
                replace(row, stats=replace(row.stats, seconds=time, waited=time - 2.0, drafting=1.0 * speculative))
                for row, time in zip(rows, times, strict=True)
            ]

    result = compare(Batch(), [Prompt("picture", [1, i], 8) for i in range(3)], temperatures=(1.0,), batch=2)
    plain, fast = ([getattr(pair, way) for pair in result.pairs] for way in ("plain", "speculative"))
    assert sum(stats.seconds for stats in plain) == pytest.approx(5.0) and sum(stats.seconds for stats in fast) == pytest.approx(2.5)
    assert result.speedup == pytest.approx(2.0)
    assert sum(stats.drafting for stats in fast) == pytest.approx(1.25) and not any(stats.drafting for stats in plain)


def test_the_reading_of_the_prompt_is_left_out_behind_it():
    class Reading(Scripted):
        """Takes a second to read the prompt, and then 10 milliseconds for each pass."""

        def generate(self, prefix, sampling, max_new_tokens, speculative, stop):
            row = super().generate(prefix, sampling, max_new_tokens, speculative, stop)
            return replace(row, stats=replace(row.stats, first=1.0, seconds=1.0 + 0.01 * (row.stats.passes - 1)))

    result = compare(Reading(), [Prompt("picture", [1, 1], 64), Prompt("answer", [1, 2], 1)], temperatures=(1.0,))
    assert result.of("picture").speedup == pytest.approx(1.63 / 1.31) and result.of("picture").behind == pytest.approx(2.0)
    assert result.of("answer").behind is None  # nothing is behind it
    rows = {row[0]: row[-1] for row in result.table().rows}
    assert rows == {"picture": "2.00 ×", "answer": None}
    assert compare(Scripted(), PROMPTS[:1], temperatures=(1.0,)).behind is None  # nobody has timed it


def test_a_guided_prompt_takes_two_lanes_of_a_batch():
    engine = Scripted()
    compare(engine, PROMPTS[:3], Sampling(guidance=2.0), temperatures=(1.0,), batch=2)
    assert {lanes for _, _, lanes in engine.batches} == {4}
