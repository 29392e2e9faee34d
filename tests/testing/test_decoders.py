import torch

from mmtp.decode.engine import Engine
from mmtp.decode.sample import Sampling
from mmtp.models.backbone import Backbone
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.vocab import Special
from mmtp.testing.decoders import LAYOUT, SIZES, decoder, drawing, widened
from mmtp.types import Modality
from tests.decode.test_engine import PICTURE
from tests.models.common import model
from tests.models.test_refiner import random_refiner


def test_sizes_are_those_that_their_names_say():
    numbers = {}
    for size in SIZES:
        with torch.device("meta"):
            numbers[size] = sum(weight.numel() for weight in Backbone(SIZES[size]).parameters()) / 1e6
    assert {size: float(f"{n:.2g}") for size, n in numbers.items()} == {
        "tiny": 0.074, "small": 7.4, "medium": 16, "350m": 340, "1b": 1000, "8b": 6900
    }  # fmt: skip


def test_one_draws_and_is_the_same_whenever_it_is_made():
    net, other = decoder("tiny", "bfloat16"), decoder("tiny", "bfloat16")
    assert net.unembedding.weight.dtype == torch.bfloat16
    state = StreamGrammar(LAYOUT).begin()
    for token in drawing(3):
        state.push(token)
    assert LAYOUT.slots[state.slot].modality is Modality.IMAGE
    row = Engine(net).generate(drawing(3), Sampling(), 50)
    assert row.new_tokens[9] == Special.EOI  # behind its codes
    assert row.tokens == Engine(other).generate(drawing(3), Sampling(), 50).tokens


def test_a_wider_one_gives_the_same_states_and_reads_more():
    net = model(depth=2).eval()
    net.refiner = random_refiner()
    wide = widened(net, 3)
    assert wide.backbone.blocks[0].mlp.down.weight.shape[1] == 3 * net.config.backbone.mlp_width and wide.refiner is net.refiner
    plain = [Engine(each).generate(PICTURE, Sampling(seed=3), 40, speculative=False) for each in (net, wide)]
    drafted = [Engine(each, draft_cost=0).generate(PICTURE, Sampling(seed=3), 40) for each in (net, wide)]
    assert len({tuple(row.tokens) for row in plain + drafted}) == 1
    assert drafted[0].stats.accepted == drafted[1].stats.accepted and drafted[0].stats.passes < plain[0].stats.passes
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), model(depth=2).eval().parameters(), strict=True))  # as it was
