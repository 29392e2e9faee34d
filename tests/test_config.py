from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from mmtp.config import Config, ConfigError, build_config, from_dict, load_file, override
from mmtp.registry import REGISTRY
from mmtp.types import Modality


class PartConfig(Config):
    family = "test-part"


class Small:
    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        width: int = 4

    def __init__(self, config):
        self.config = config


class Large:
    @dataclass(frozen=True, kw_only=True)
    class Config(PartConfig):
        depth: int

        def __post_init__(self):
            if self.depth < 1:
                raise ValueError(f"depth is {self.depth}, 1 is the least")

    def __init__(self, config, scale=1):
        self.config, self.scale = config, scale


@dataclass(frozen=True, kw_only=True)
class Optim(Config):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


class Whole:
    @dataclass(frozen=True, kw_only=True)
    class Config(Config):
        name: str
        part: PartConfig = field(default_factory=Small.Config)
        optim: Optim = field(default_factory=Optim)
        sizes: tuple[int, ...] = ()
        mode: Literal["a", "b"] = "a"
        limit: int | None = None
        modality: Modality = Modality.TEXT
        table: dict[str, float] = field(default_factory=dict)
        folder: Path | None = None

    def __init__(self, config):
        self.config = config


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(REGISTRY, "_families", {k: dict(v) for k, v in REGISTRY._families.items()})
    for family, name, cls in [("test-part", "small", Small), ("test-part", "large", Large), ("test-whole", "whole", Whole)]:
        REGISTRY.register(family, name, f"{cls.__module__}:{cls.__qualname__}")


def test_a_config_survives_dict_and_names_classes_by_registry():
    config = Whole.Config(
        name="x", part=Large.Config(depth=3), sizes=(1, 2), mode="b", limit=7, modality=Modality.IMAGE, table={"a": 1.0}, folder=Path("f")
    )
    data = config.to_dict()
    assert data["type"] == "whole"
    assert data["part"] == {"type": "large", "depth": 3}
    assert data["modality"] == "image"
    data["folder"] = str(data["folder"])
    assert build_config("test-whole", data) == config


def test_build_hands_the_config_and_runtime_objects_to_the_owner():
    built = Large.Config(depth=2).build(scale=5)
    assert isinstance(built, Large)
    assert (built.config.depth, built.scale) == (2, 5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "x", "siz": [1]}, "c: unknown key 'siz'; did you mean 'sizes'?"),
        ({"name": "x", "zzzzzz": 1}, "c: unknown key 'zzzzzz'; known keys: "),
        ({}, "c: key 'name' is missing"),
        ({"name": 3}, "c.name: str is wanted, 3 given"),
        ({"name": "x", "sizes": [1, "b"]}, "c.sizes[1]: int is wanted, 'b' given"),
        ({"name": "x", "sizes": [True]}, "c.sizes[0]: int is wanted, True given"),
        ({"name": "x", "mode": "c"}, "c.mode: 'c' is not one of 'a', 'b'"),
        ({"name": "x", "limit": 1.5}, "c.limit: int is wanted, 1.5 given"),
        ({"name": "x", "modality": "smell"}, "c.modality: 'smell' is not a valid Modality"),
        ({"name": "x", "optim": {"betas": [0.9]}}, "c.optim.betas: 2 values are wanted, 1 given"),
        ({"name": "x", "optim": {"lrr": 1}}, "c.optim: unknown key 'lrr'; did you mean 'lr'?"),
        ({"name": "x", "part": {"type": "smal"}}, "no test-part is called 'smal'; did you mean 'small'?"),
        ({"name": "x", "part": {"type": "large", "depth": 0}}, "c.part: depth is 0, 1 is the least"),
    ],
)
def test_what_does_not_fit_is_named(data, message):
    with pytest.raises(ValueError) as raised:
        Whole.Config.from_dict(data, "c")
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_whole_numbers_are_good_floats_and_null_is_none():
    config = Whole.Config.from_dict({"name": "x", "optim": {"lr": 1}, "limit": None})
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert config.limit is None


def test_plain_dataclasses_are_read_as_strictly():
    @dataclass
    class Point:
        x: int

    assert from_dict(Point, {"x": 1}) == Point(1)
    with pytest.raises(ConfigError, match="unknown key 'y'"):
        from_dict(Point, {"x": 1, "y": 2})


def test_a_table_without_type_names_what_there_is():
    with pytest.raises(ConfigError, match="key 'type' is missing; known test-parts: large, small"):
        build_config("test-part", {"width": 3})


def test_override_writes_toml_values_and_leaves_the_original():
    data = {"run": {"steps": 10}, "name": "x"}
    changed = override(data, ["run.steps=20", "run.lr=3e-4", "name=plain words", "new.deep.list=[1, 2]", "flag=true"])
    assert changed == {"run": {"steps": 20, "lr": 3e-4}, "name": "plain words", "new": {"deep": {"list": [1, 2]}}, "flag": True}
    assert data == {"run": {"steps": 10}, "name": "x"}


@pytest.mark.parametrize(("assignment", "message"), [("steps", "write key=value"), ("name.x=1", "'name' is a value, not a table")])
def test_override_refuses_what_it_cannot_place(assignment, message):
    with pytest.raises(ConfigError, match=message):
        override({"name": "x"}, [assignment])


def test_files_are_read_by_their_ending(tmp_path):
    (tmp_path / "a.json").write_text('{"x": 1}')
    (tmp_path / "a.toml").write_text("x = 1\n[y]\nz = 'ä'\n", encoding="utf-8")
    assert load_file(tmp_path / "a.json") == {"x": 1}
    assert load_file(tmp_path / "a.toml") == {"x": 1, "y": {"z": "ä"}}


@pytest.mark.parametrize(("name", "content"), [("a.json", b"{"), ("a.toml", b"x = "), ("a.toml", b"\xff\xfe"), ("gone.toml", None)])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        load_file(tmp_path / name)
