from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mmtp.data.errors import DataError
from mmtp.data.plan import Plan
from mmtp.data.sources import Item, Sample


@dataclass
class ListSource:
    listed: list[Item]
    name: str = "list"

    def items(self) -> list[Item]:
        return self.listed

    def read(self, item: Item) -> Sample:
        return Sample(item.key, b"")


ITEMS = [Item(f"k{i}", f"f{i}", "", i, str(i)) for i in range(10)]


def test_ranges_cover_every_input_once() -> None:
    plan = Plan.of(ListSource(ITEMS), 4)
    assert [plan.range(s) for s in range(plan.num_shards)] == [(0, 4), (4, 8), (8, 10)]
    assert [item for s in range(3) for item in plan.items(s)] == ITEMS


@pytest.mark.parametrize(("inputs", "wanted"), [(10, 256), (64 * 300, 300), (64 * 70000, 65536)])
def test_default_number_of_inputs_per_shard(inputs: int, wanted: int) -> None:
    class Many(list):
        def __len__(self) -> int:
            return inputs

    assert Plan.of(ListSource(Many(ITEMS))).shard_inputs == wanted


def test_file_round_trip(tmp_path: Path) -> None:
    plan = Plan.of(ListSource(ITEMS), 4)
    path = tmp_path / "plan.arrow"
    path.write_bytes(plan.to_bytes())
    read = Plan.read(path)
    assert (read.source, read.shard_inputs, read.hash) == ("list", 4, plan.hash)
    assert read.items(2) == ITEMS[8:]
    path.write_bytes(plan.to_bytes()[:-30])
    with pytest.raises(DataError, match=r"plan\.arrow: is missing or damaged; run the same mmtp tokenize again"):
        Plan.read(path)


def test_differences_are_named() -> None:
    plan = Plan.of(ListSource(ITEMS), 4)
    changed = [*ITEMS[:3], replace(ITEMS[3], size=99, stamp="now"), *ITEMS[4:]]
    cases = {
        "the source was list and is other": Plan.of(ListSource(ITEMS, "other"), 4),
        "shards held 4 inputs and are to hold 5": Plan.of(ListSource(ITEMS), 5),
        "input 'k3' has changed (size was 3, is 99, stamp was 3, is now)": Plan.of(ListSource(changed), 4),
        "input 2 was 'k2' and is 'k3'": Plan.of(ListSource([*ITEMS[:2], *ITEMS[3:]]), 4),
        "there were 10 inputs and are 9": Plan.of(ListSource(ITEMS[:9]), 4),
    }
    assert {words: plan.difference(other) for words, other in cases.items()} == {words: words for words in cases}
    assert len({plan.hash, *(other.hash for other in cases.values())}) == 6


def test_empty_source_is_refused() -> None:
    with pytest.raises(DataError, match="list: holds no inputs"):
        Plan.of(ListSource([]))


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    plan = Plan.of(ListSource([Item(name, name)]))
    assert plan.items(0) == [Item("caf\\udce9.png", name)]
