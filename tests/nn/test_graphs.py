"""Passes that are recorded, by a tape in place of CUDA graphs: what decoding gives, and what a replay may read."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtp.decode import chooser as chooser_module
from mmtp.decode.cache import CacheFullError
from mmtp.decode.chooser import Chooser
from mmtp.decode.draft_model import ModelDrafts
from mmtp.decode.engine import Engine
from mmtp.decode.lookup import LookupDrafts
from mmtp.decode.rows import Request
from mmtp.decode.sample import Sampling
from mmtp.models.heads.base import HeadConfig
from mmtp.models.heads.next import NextHead
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.heads.synchronized import SynchronizedHead
from mmtp.models.unified import UnifiedModel
from mmtp.nn import block, graphs
from mmtp.nn.block import Block
from mmtp.nn.graphs import WIDTHS, Graphs, padded_width
from mmtp.nn.rope import Rope
from mmtp.stream.vocab import Special
from mmtp.testing import tape
from mmtp.testing.traffic import stir
from mmtp.types import Modality
from tests.models.common import BACKBONE, LAYOUT

TEXT = [Special.BOS, Special.USER, *range(40, 60), Special.END, Special.ASSISTANT, 40, 41]
CODE = LAYOUT.code_range(Modality.IMAGE)[0]
PICTURE = [*TEXT, Special.BOI, LAYOUT.dim(3), LAYOUT.dim(4), *range(CODE, CODE + 5)]
LONG = [*TEXT[:2], *[40 + i % 30 for i in range(100)], *TEXT[-4:]]
PREFIXES = [PICTURE, TEXT, LONG, PICTURE[:-3]]
SAMPLINGS = [Sampling(seed=0), Sampling(seed=1, temperature=0), Sampling(seed=2, guidance=2.0), Sampling(seed=3, repetition_penalty=1.3)]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Lets compiled passes on a CPU be recorded ones, by a tape, their operations one by one; the shapes of those that are."""
    shapes = []

    def record(run: Any, device: torch.device) -> Any:
        replay = tape.record(run, device)
        shapes.append(tuple(replay().shape))
        return replay

    monkeypatch.setattr(chooser_module, "_records", lambda device: True)
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(block, "fused", lambda function: function)
    return shapes


def build(head: HeadConfig | None = None, **changes: Any) -> UnifiedModel:
    torch.manual_seed(0)
    config = UnifiedModel.Config(layout=LAYOUT, backbone=replace(BACKBONE, **changes), head=head or NextHead.Config())
    net = config.build().eval()
    stir(net)
    return net


@pytest.mark.parametrize("head", [NextHead.Config(), SequentialHead.Config(mtp_depth=3), SynchronizedHead.Config(mtp_depth=2, vertical=3)])
def test_recorded_passes_give_what_others_give(head: HeadConfig, recorded: list[tuple[int, ...]]) -> None:
    net = build(head)
    wanted = [row.tokens for row in Engine(net).generate_batch(PREFIXES, SAMPLINGS, 40, speculative=False)]
    engine = Engine(net, compile=True, draft_cost=0)
    assert not recorded
    for speculative in (False, True):
        assert [row.tokens for row in engine.generate_batch(PREFIXES, SAMPLINGS, 40, speculative, max_lanes=3)] == wanted
        assert engine.generate(PICTURE, SAMPLINGS[0], 40, speculative).tokens == wanted[0]
    assert {(1, 1), (2, 1), (3, 1), (1, 2)} <= {shape[:2] for shape in recorded}
    assert all(shape[1] in WIDTHS for shape in recorded)


@pytest.mark.parametrize("changes", [{"window": 24}, {"qk_norm": False, "num_kv_heads": BACKBONE.num_heads}])
def test_of_any_attention(changes: dict[str, Any], recorded: list[tuple[int, ...]]) -> None:
    net = build(**changes)
    for speculative in (False, True):
        found, wanted = (
            Engine(net, compile=compiled, draft_cost=0, drafts=LookupDrafts()).generate(LONG, Sampling(), 60, speculative).tokens
            for compiled in (True, False)
        )
        assert found == wanted
    assert recorded


def test_a_model_that_drafts_is_recorded_as_well(recorded: list[tuple[int, ...]]) -> None:
    net, small = build(), build(depth=1)
    wanted = Engine(net).generate(TEXT, Sampling(), 30, speculative=False).tokens
    engine = Engine(net, compile=True, draft_cost=0, drafts=ModelDrafts(small))
    found = engine.generate(TEXT, Sampling(), 30)
    assert found.tokens == wanted
    assert found.stats.drafted
    assert engine.drafts.chooser.recorded


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_keys_and_values_may_be_held_in_fewer_bits(stored: str, recorded: list[tuple[int, ...]]) -> None:
    net = build()
    found, wanted = (Engine(net, cache=stored, compile=compiled).generate(PICTURE, Sampling(), 40).tokens for compiled in (True, False))
    assert found == wanted
    assert recorded


def test_a_pass_is_recorded_once_and_reaches_the_end_of_the_context(recorded: list[tuple[int, ...]]) -> None:
    net = build()
    batcher = Engine(net, compile=True).batcher(max_lanes=1, context=300, speculative=False)
    where = batcher.cache.storage.data_ptr()
    row = batcher.submit(Request(prefix=LONG, sampling=Sampling(temperature=0), max_new_tokens=300 - len(LONG)))
    while not row.done:
        batcher.step()
    wanted = Engine(net).generate(LONG, Sampling(temperature=0), 300 - len(LONG), speculative=False).tokens
    assert row.tokens == wanted
    assert batcher.cache.storage.data_ptr() == where
    # Attended to were 256 places, and then all of them.
    assert recorded == [(1, 1, BACKBONE.width)] * 2


def test_padding_may_stand_behind_the_last_place(recorded: list[tuple[int, ...]]) -> None:
    net, found = build(), []
    for compiled in (False, True):
        cache = Chooser(net, compiled=compiled).new_cache(BACKBONE.depth, 1, 64)
        for first, width in ((0, 61), (61, 3)):
            positions = torch.arange(first, first + width)[None, :, None].expand(1, -1, 3)
            tokens = torch.arange(40, 40 + width)[None]
            with torch.inference_mode():
                states = net.extend(net.embed(tokens), positions, cache.begin(width), cache.layers, [[0] * width])
            cache.commit([width])
        found.append(states)
        with pytest.raises(CacheFullError):
            cache.begin(1)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert recorded == [(1, 4, BACKBONE.width)]


def test_a_replay_reads_what_it_is_given(recorded: list[tuple[int, ...]]) -> None:
    recorder, generator, runs = Graphs(), torch.Generator().manual_seed(0), []
    memory, lanes = torch.zeros(2, 32, 3), torch.arange(2)[:, None]

    def run(x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        runs.append(x.shape)
        assert mask.any(3).all()  # padding, too, sees something, or it would be made of no numbers
        memory[lanes, recorder.slots] = x
        return x + positions + mask[:, 0].float() @ memory

    found, wanted, kept = [], [], torch.zeros(2, 32, 3)
    for start in (0, 5, 9, 20):
        for width in (3, 4):
            x = torch.randn(2, width, 3, generator=generator)
            positions = torch.randint(0, 9, (2, width, 3), generator=generator)
            mask = torch.rand(2, 1, width, 32, generator=generator) < 0.5
            slots = start + torch.arange(4).expand(2, -1)
            recorder.begin(0, slots)
            found.append(recorder(run, x, positions, mask))
            kept[lanes, slots] = torch.nn.functional.pad(x, (0, 0, 0, 4 - width))
            wanted.append(x + positions + mask[:, 0].float() @ kept)
    assert runs == [(2, 4, 3)] * 2  # once to warm up, once to record; Python has seen none of the others
    for out, each in zip(found, wanted, strict=True):
        torch.testing.assert_close(out, each)


def test_passes_of_other_lanes_and_extents_are_others_and_the_oldest_go(recorded: list[tuple[int, ...]], monkeypatch: Any) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    recorder = Graphs()

    def ask(first: int, width: int, extent: int) -> int:
        before = len(recorded)
        recorder.begin(first, torch.zeros(1, padded_width(width), dtype=torch.long))
        given = torch.zeros(1, width, 3), torch.zeros(1, width, 3, dtype=torch.long), torch.ones(1, 1, width, extent) > 0
        recorder(lambda x, positions, mask: x + 1, *given)
        return len(recorded) - before

    passes = [(0, 1, 8), (0, 1, 8), (1, 1, 8), (0, 1, 8), (0, 1, 16), (0, 1, 8), (1, 1, 8), (0, WIDTHS[-1] + 1, 8)]
    assert [ask(*each) for each in passes] == [1, 0, 1, 0, 1, 0, 1, 0]  # what reads prompts is not recorded


def test_padding_is_of_few_widths() -> None:
    assert [padded_width(width) for width in (1, 3, 5, 16, 17, 33, 200)] == [1, 4, 8, 16, 32, 33, 200]


def check_fused() -> None:
    """Without graph breaks, for all blocks and shapes alike, but for one lane and one token, which torch compiles by themselves."""
    net, rope, compiled = (Block(32, 4, 2, 8, 64), Block(32, 4, 2, 8, 64)), Rope(8, 1e4), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    ask, answer = (torch.compile(each, dynamic=True, fullgraph=True, backend=backend) for each in (Block._ask, Block._answer))
    with torch.inference_mode():
        for lanes, width in ((3, 4), (2, 16), (5, 2), (1, 8), (1, 1), (4, 1), (7, 1), (1, 32)):
            angles = rope(torch.randint(0, 50, (lanes, width, 3)))
            for layer in net:
                x, read = torch.randn(lanes, width, 32), torch.randn(lanes, width, 32)
                torch.testing.assert_close(ask(layer, x, angles), layer._ask(x, angles))
                torch.testing.assert_close(answer(layer, x, read), layer._answer(x, read))
    assert len(compiled) == 2 * 4
    # And as decoding has them.
    graphs.BACKEND = "aot_eager"
    chooser_module._records = lambda device: True
    net = build()
    found, wanted = (Engine(net, compile=compiled).generate(PICTURE, Sampling(), 20).tokens for compiled in (True, False))
    assert found == wanted


def test_what_is_fused_is_one_graph_for_all_blocks_and_shapes() -> None:
    # In a process of its own, where no checks of shapes stand around every function.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    argv = [sys.executable, "-c", "from tests.nn.test_graphs import check_fused; check_fused()"]
    done = subprocess.run(argv, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
def test_an_accelerator_gives_what_it_gives_kernel_by_kernel() -> None:
    net = build(SequentialHead.Config(mtp_depth=3)).to("cuda")
    wanted = [row.tokens for row in Engine(net).generate_batch(PREFIXES, SAMPLINGS, 40, speculative=False)]
    engine = Engine(net, compile=True, draft_cost=0)
    for speculative in (False, True):
        assert [row.tokens for row in engine.generate_batch(PREFIXES, SAMPLINGS, 40, speculative)] == wanted
