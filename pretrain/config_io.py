"""YAML and command-line overrides to a checked RunConfig, and back. Loads without torch."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pretrain.config import LanguageRunConfig, RunConfig
from pretrain.config_sections import ConfigError
from pretrain.vision_config import VisionRunConfig

TASKS: dict[str, type[RunConfig]] = {"language": LanguageRunConfig, "vision": VisionRunConfig}
"""What a config file's `task` stands for; a file that names none is of a language model."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


class _Loader(yaml.SafeLoader):
    """Plain data alone, and no key twice in a mapping: YAML forbids it, PyYAML takes the last and drops what came before."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Before `<<` is resolved: a key may replace one that it merges in.
        node = super().compose_mapping_node(anchor)
        marks: dict[tuple[str, str], yaml.Mark] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name = (key.tag, key.value)
            if name in marks:
                raise yaml.YAMLError(
                    f"line {key.start_mark.line + 1}: {key.value} is given twice, first in line {marks[name].line + 1}: "
                    "leave one, or join them"
                )
            marks[name] = key.start_mark
        return node


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that the YAML file at `path` describes, with `a.b=value` overrides applied (values are YAML too).

    Raises ConfigError for an unreadable file, a key given twice, an unknown key (naming the nearest), an ill-typed or an
    invalid value.
    """
    try:
        raw = yaml.load(Path(path).read_text(), Loader=_Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:  # PyYAML leaves the 30th of February to datetime
        raise ConfigError(f"config {path} cannot be read: {error}") from None
    _require(isinstance(raw, dict), f"config {path}: must be a mapping of sections")
    for override in overrides:
        _apply_override(raw, override)
    return config_from_dict(raw)


def config_from_dict(raw: dict[str, Any]) -> RunConfig:
    """The run that plain nested data describes, as YAML or a checkpoint's manifest holds it."""
    task = raw.get("task", "language")
    _require(isinstance(task, str) and task in TASKS, f"task={task!r}: must be one of {', '.join(TASKS)}")
    config = _build(TASKS[task], raw, "")
    assert isinstance(config, RunConfig)
    return config


def config_to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config_to_plain(config), sort_keys=False)


def config_to_plain(config: RunConfig) -> dict[str, Any]:
    """The resolved config as dicts, lists, numbers and strings; `config_from_dict` reads it back to an equal one."""
    plain = _plain(asdict(config))
    assert isinstance(plain, dict)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    _require(bool(equals) and bool(key), f"override {override!r}: write section.field=value")
    try:
        value = yaml.load(text, Loader=_Loader) if text else ""
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None
    *sections, name = key.split(".")
    node = raw
    for section in sections:
        node = node.setdefault(section, {})
        _require(isinstance(node, dict), f"override {override!r}: {section} is a value, not a section")
    node[name] = value


def _build(cls: type, raw: Any, where: str) -> Any:
    _require(isinstance(raw, dict), f"{where or 'config'}: must be a mapping, got {raw!r}")
    known = {f.name: f for f in fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {_join(where, near[0])}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"unknown key {_join(where, str(key))}: {hint}")
    values = {key: _convert(hints[key], value, _join(where, key)) for key, value in raw.items()}
    missing = [name for name, f in known.items() if name not in values and not _has_default(f)]
    _require(not missing, f"{', '.join(_join(where, name) for name in missing)}: required, and not given")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _has_default(f: Any) -> bool:
    return f.default is not MISSING or f.default_factory is not MISSING


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type that `hint` names; ConfigError where it is of another type."""
    if is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        _require(value in args, f"{where}={value!r}: must be one of {', '.join(map(str, args))}")
        return value
    if origin in (typing.Union, types.UnionType):
        for option in args:
            if option is type(None) and value is None:
                return None
        return _convert(next(option for option in args if option is not type(None)), value, where)
    if origin is tuple:
        _require(isinstance(value, list | tuple), f"{where}={value!r}: must be a list")
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        _require(len(value) == len(args), f"{where}={value!r}: must have {len(args)} values")
        return tuple(
            _convert(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True))
        )
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 6e-4 as a string
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{where}={value!r}: must be a number") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(f"{where}: has {len(str(value))} digits, must be a finite number") from None
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    _require(right, f"{where}={value!r}: must be {hint.__name__}, got {type(value).__name__}")
    _require(hint is not float or math.isfinite(value), f"{where}={value!r}: must be a finite number")
    return value
