"""Gin, in one place: files and bindings are read, checked and finalised here.

Library code knows no gin; files register what they configure by `dynamic_registration`. Upper-case
macros are the settings that people give. Gin itself swallows a misspelt one; here a macro that is
bound but never used is an error, and so is one that is used but has no value.
"""

import difflib
import importlib.util  # noqa: F401 (gin uses it without importing it)
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin
from gin import config as gin_config

from glimmer_jax import shipped

# Earlier macro names -> their present ones, which are T5X's.
RENAMED = {
    "BEAMS": "BEAM_SIZE",
    "DTYPE": "ACTIVATION_DTYPE",
    "EVAL_EVERY": "EVAL_PERIOD",
    "EVAL_EXAMPLES": "EVALUATOR_NUM_EXAMPLES",
    "MATCHING_START": "MIMETIC_INIT",
    "NUM_EXAMPLES": "EVALUATOR_NUM_EXAMPLES",
    "OUTPUT_DIR": "EVAL_OUTPUT_DIR",
    "OUTPUT_PATH": "INFER_OUTPUT_DIR",
    "SEED": "RANDOM_SEED",
    "SPLIT": "MIXTURE_OR_TASK_SPLIT",
}


class ConfigError(ValueError):
    """A gin file or binding at fault; the message is one line."""


def parse(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    unbound: Mapping[str, str] | None = None,
) -> None:
    """Reads files, then bindings, in order, and locks the configuration.

    Args:
      gin_files: paths, tried as they are, then below `search_paths`, then below the shipped root.
      bindings: such as `TRAIN_STEPS = 10`.
      search_paths: folders.
      unbound: macro -> value of those that are used and that nothing else gives a value.

    Raises:
      ConfigError: a file is missing or malformed, or macros and bindings do not fit together.
    """
    gin.clear_config()
    gin_config._LOCATION_PREFIXES[:] = ["", *search_paths, str(shipped.root())]
    shipped.make_importable()
    # Gin logs an error for every folder in which it does not find a file before it does.
    search_noise = logging.getLogger()
    search_noise.addFilter(_is_not_search)
    try:
        for path in gin_files:
            gin.parse_config_file(path)
        gin.parse_config(list(bindings))
        missing = [name for name in missing_macros() if name in (unbound or {})]
        gin.parse_config([f"{name} = {(unbound or {})[name]}" for name in missing])
        check_macros()
        gin.finalize()
    except ConfigError:
        raise
    # Whatever gin raises while it reads what a person wrote is about what that person wrote.
    except (
        ValueError,
        SyntaxError,
        NameError,
        AttributeError,
        ImportError,
        OSError,
        TypeError,
        RuntimeError,
        KeyError,
    ) as error:
        raise ConfigError(first_line(error)) from error
    finally:
        search_noise.removeFilter(_is_not_search)


def configured(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its bindings applied.

    Raises:
      ConfigError: no gin file configures it.
    """
    place = f"{function.__module__}.{function.__name__}"
    if not any(selector == place for _, selector in gin_config._CONFIG):
        raise ConfigError(f"No gin file configures {place}. Add one of gin/runs with --gin_file.")
    return gin.get_configurable(function)


def settings(function: Callable[..., Any]) -> dict[str, Any]:
    """What `function` would be called with.

    Raises:
      ConfigError: no gin file configures it.
    """
    configured(function)
    return gin.get_bindings(function)


def operative_config() -> str:
    """The bindings that were used so far, as a gin file."""
    return gin.operative_config_str()


def first_line(error: object) -> str:
    """A message, or that of an error, on one line, without the places that gin adds below it."""
    text = str(error).strip() or type(error).__name__
    text = re.split(r"\n\s*(?:In (?:call to configurable|binding|file|bindings)|\n)", text)[0]
    return " ".join(text.split())


def _is_not_search(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Path not found")


def check_macros() -> None:
    """Raises ConfigError for macros that are bound and unused, or used and without a value."""
    used, bound = _macros()
    if unused := sorted(bound - used):
        raise ConfigError("; ".join(_unused(name, used) for name in unused))
    if missing := missing_macros():
        raise ConfigError(
            f"No value for {', '.join(missing)}. Set it in a gin file, or on the command line: "
            f"--gin.{missing[0]}=…"
        )


def missing_macros() -> list[str]:
    """Macros that are used and have no value."""
    used, bound = _macros()
    config = gin_config._CONFIG
    return sorted((used - bound) | {name for name in bound if _is_required(config, name)})


def _macros() -> tuple[set[str], set[str]]:
    """Those that are used, and those that are bound."""
    # Gin offers its configuration only to hooks, and its own hooks run first, with messages that
    # list every binding.
    config = gin_config._CONFIG
    macro = gin.get_configurable("gin.macro")
    used = {ref.config_key[0] for ref in gin_config.iterate_references(config, to=macro)}
    return used, {scope for scope, selector in config if selector == "gin.macro"}


def _unused(name: str, used: set[str]) -> str:
    close = difflib.get_close_matches(name, used, n=1)
    if RENAMED.get(name) in used:
        close = [RENAMED[name]]
    known = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(used))}."
    return f"{name} is set, but nothing uses it: {known}"


def _is_required(config: Any, name: str) -> bool:
    return repr(config[name, "gin.macro"]["value"]) == "%gin.REQUIRED"
