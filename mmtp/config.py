"""Configurations: frozen dataclasses that read and write dict, JSON and TOML, and build what they describe.

A buildable class nests its configuration::

    class Codec:
        class Config(mmtp.config.Config): ...          # with @dataclass(frozen=True, kw_only=True)
        def __init__(self, config: Config) -> None: ...

``Codec.Config(width=64).build()`` is ``Codec(Codec.Config(width=64))``. A field whose type is ``Config`` (or a union of
configs) may hold any registered class's configuration; on disk it is a table with a ``type`` key, the registry name.
"""

import dataclasses
import difflib
import json
import sys
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from mmtp.registry import REGISTRY
from mmtp.types import MmtpError

T = TypeVar("T")
C = TypeVar("C", bound="Config")


class ConfigError(MmtpError):
    """A configuration that cannot be read: names the field, and the nearest one where a key is unknown."""


class Config:
    """Base of all configurations; subclasses are ``@dataclass(frozen=True, kw_only=True)``."""

    @classmethod
    def owner(cls) -> type:
        """The class that this configuration is nested in."""
        owner: Any = sys.modules[cls.__module__]
        for part in cls.__qualname__.split(".")[:-1]:
            owner = getattr(owner, part)
        return owner

    def build(self, **runtime: Any) -> Any:
        """Builds the owner. ``runtime`` holds objects that do not belong into a file (layouts, devices)."""
        return self.owner()(self, **runtime)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only; registered owners are named by a ``type`` key."""
        out: dict[str, Any] = {}
        if "." in type(self).__qualname__:
            out["type"] = REGISTRY.name_of(self.owner())[1]
        for field in dataclasses.fields(self):  # pyrefly: ignore
            out[field.name] = _plain(getattr(self, field.name))
        return out

    @classmethod
    def from_dict(cls: type[C], data: dict[str, Any], where: str = "config") -> C:
        """Reads what ``to_dict`` wrote.

        Args:
            data: plain values; keys may be missing where the field has a default.
            where: what error messages call this table.

        Raises:
            ConfigError: an unknown key, a missing one, or a value of the wrong type.
        """
        return from_dict(cls, {k: v for k, v in data.items() if k != "type"}, where)


def from_dict(cls: type[T], data: dict[str, Any], where: str = "config") -> T:
    """Builds any dataclass from plain values, strictly: unknown keys and wrong types are errors."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(fields))}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _typed(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: key {name!r} is missing")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def build_config(family: str, data: dict[str, Any], where: str = "config") -> Config:
    """The configuration of a registered class, found by the table's ``type`` key."""
    if "type" not in data:
        raise ConfigError(f"{where}: key 'type' is missing; known {family}s: {', '.join(REGISTRY.names(family))}")
    return REGISTRY.resolve(family, data["type"]).Config.from_dict(data, where)


def load_file(path: Path) -> dict[str, Any]:
    """Reads a JSON or TOML file, by its ending."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        return json.loads(text) if Path(path).suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def override(data: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Applies ``a.b=value`` assignments (values in TOML syntax, else plain strings) to a nested table."""
    out = json.loads(json.dumps(data))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment!r}: write key=value")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        *path, last = key.split(".")
        table = out
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {assignment!r}: {part!r} is a value, not a table")
        table[last] = value
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, str) else value


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Annotated:
        return _typed(args[0], value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for arm in (a for a in args if a is not type(None)):
            try:
                return _typed(arm, value, where)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError(errors[0])
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin in (tuple, list) and isinstance(value, list | tuple):
        if origin is tuple and len(args) > 1 and args[-1] is not Ellipsis:
            if len(value) != len(args):
                raise ConfigError(f"{where}: {len(args)} values are wanted, {len(value)} given")
            return tuple(_typed(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
        return origin(_typed(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _typed(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(hint, type) and isinstance(value, hint) and not (isinstance(value, bool) and hint is int):
        return value
    if isinstance(value, dict) and isinstance(hint, type):
        if issubclass(hint, Config) and "type" in value:
            return _registered(hint, value, where)
        if dataclasses.is_dataclass(hint):
            return from_dict(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and issubclass(hint, str) and isinstance(value, str):
        try:
            return hint(value)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
    if hint is Path and isinstance(value, str):
        return Path(value)
    wanted = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ConfigError(f"{where}: {wanted} is wanted, {value!r} given")


def _registered(hint: type[Config], value: dict[str, Any], where: str) -> Config:
    """Resolves a nested table by its ``type``, in the family that the field's configuration belongs to."""
    family = getattr(hint, "family", None) or REGISTRY.name_of(hint.owner())[0]
    config = build_config(family, value, where)
    if not isinstance(config, hint):
        raise ConfigError(f"{where}: type {value['type']!r} does not fit here")
    return config
