"""Configuration as frozen dataclasses: TOML in and out, unknown keys and wrong values refused."""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from features.errors import BadInputError
from features.schema import reject_unknown

Config = TypeVar("Config")


def check_least(config: Any, least: Mapping[str, float]) -> None:
    """Raise for the first number of a configuration that is too small.

    Args:
        config: a dataclass.
        least: the least value by field; what is not here is at least 0.

    Raises:
        BadInputError: it names the field and its value.
    """
    for name in (f.name for f in dataclasses.fields(config)):
        value = getattr(config, name)
        bound = least.get(name, 0)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(number >= bound for number in numbers if isinstance(number, int | float)):
            raise BadInputError(f"'{name}' must be {bound} or more, got {value}")


def to_toml(config: Any) -> str:
    """Return a configuration dataclass as TOML text, nested ones as tables, or lists of them."""
    return _tables(config, "")


def _tables(config: Any, prefix: str) -> str:
    plain, nested = [], []
    for name, value in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config)):
        if dataclasses.is_dataclass(value):
            nested.append(f"\n[{prefix}{name}]\n{_tables(value, f'{prefix}{name}.')}")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            nested += [f"\n[[{prefix}{name}]]\n{_tables(item, '')}" for item in value]
        else:
            plain.append(f"{name} = {_toml_value(value)}\n")
    return "".join(plain) + "".join(nested)


def from_toml(path: Path, into: type[Config]) -> Config:
    """Read a configuration; what is not given keeps its default.

    Raises:
        BadInputError: the file is missing or not TOML, or a key or value does not fit.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInputError(f"{path}: no such configuration file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: not valid TOML: {error}") from error
    return from_dict(str(path), content, into)


def from_dict(where: str, content: dict[str, Any], into: type[Config]) -> Config:
    """Make the dataclass ``into`` of a nested dict, refusing unknown keys and wrong types."""
    hints = get_type_hints(into)
    reject_unknown(where, content, hints)
    values = {k: _checked(f"{where}: '{k}'", value, hints[k]) for k, value in content.items()}
    for entry in dataclasses.fields(into):  # type: ignore[arg-type]
        if _is_needed(entry) and entry.name not in values:
            raise BadInputError(f"{where}: '{entry.name}' is missing")
    try:
        return into(**values)
    except BadInputError as error:
        raise BadInputError(f"{where}: {error}") from None


def _is_needed(entry: "dataclasses.Field[Any]") -> bool:
    return entry.default is entry.default_factory is dataclasses.MISSING


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, str):
        # TOML's basic strings escape as JSON's do, and one control character more.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _checked(where: str, value: Any, kind: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise BadInputError(f"{where} must be a table, got {value!r}")
        return from_dict(where, value, kind)  # type: ignore[arg-type]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise BadInputError(
                f"{where} must be one of {', '.join(get_args(kind))}, got {value!r}"
            )
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise BadInputError(f"{where} must be a list, got {value!r}")
        return tuple(_checked(where, item, get_args(kind)[0]) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadInputError(f"{where} must be {kind.__name__}, got {value!r}")
    return value
