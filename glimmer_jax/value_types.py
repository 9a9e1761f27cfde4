"""Values of settings compared with the annotations of the parameters that they are for."""

import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal


def is_text(value: str) -> bool:
    """Whether a string can be a path or be encoded."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def conforms(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation; true for annotations that are not known here."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(conforms(value, choice) for choice in choices)
    if origin is Literal:
        return value in choices
    if hint is types.NoneType:
        return value is None
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if value is None:
        return hint is not bool  # "not given": the mode itself reports a required setting
    if hint in (str, bool):
        return isinstance(value, hint)
    if origin in (Sequence, list, tuple):
        return isinstance(value, list | tuple) and all(
            item is not None and conforms(item, choices[0]) for item in value if choices
        )
    if origin in (Mapping, dict):
        return isinstance(value, dict)
    # Gin's values are literals, never objects of ours.
    return not (inspect.isclass(hint) and hint.__module__.startswith("glimmer_jax."))


def name_of(hint: Any) -> str:
    """A type as a message names it."""
    kinds = {Mapping: "dict", dict: "dict", Sequence: "list", list: "list", tuple: "list"}
    if (origin := typing.get_origin(hint)) in kinds:
        items = typing.get_args(hint)
        return (
            f"list of {name_of(items[0])}" if kinds[origin] == "list" and items else kinds[origin]
        )
    return hint.__name__ if inspect.isclass(hint) else re.sub(r"\b[\w.]+\.(?=\w)", "", str(hint))


def example(hint: Any) -> str:
    """A value of the annotated type, as a shell takes it."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return example(choices[0])
    if origin is Literal:
        return f"\"'{choices[0]}'\""
    if origin in (Mapping, dict):
        return "\"{'inputs': 48, 'targets': 32, 'passages': (40, 304)}\""
    if origin in (Sequence, list, tuple):
        return "\"['a', 'b']\"" if str in choices else '"[0, 1]"'
    return {int: "8", float: "0.1", bool: "True", str: "\"'text'\""}.get(hint, "None")
