"""The gin configuration: files and bindings are read, checked and finalised here.

Library code does not use gin; gin files register what they configure by `dynamic_registration`.
Upper-case macros are the settings that users give. Gin ignores a macro that nothing uses; here it is
an error with a suggestion, as are a used macro without a value and a value of the wrong type.
"""

import ast
import contextlib
import difflib
import functools
import importlib.util  # noqa: F401 (gin uses it without importing it)
import inspect
import logging
import re
import tokenize
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import gin
    from gin import config as gin_config
    from gin import config_parser
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "gin is not installed. Install it with: pip install gin-config", name=error.name
    ) from None

from glimmer_jax import shipped, value_types

# Values of macros that a file uses and nothing binds, where the parameter may be None: the mode takes
# what the checkpoint records. A binding in a run file would replace that of a model's file before it.
FROM_CHECKPOINT = {
    "MODEL": "None",
    "NUM_KEPT": "'checkpoint'",
    "MEMORY_CODEC": "None",
    "TASK_FEATURE_LENGTHS": "None",
    "MAX_PASSAGE_TOKENS": "None",
    "VOCABULARY": "None",
}
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
    """A faulty gin file or binding; the message is one line."""


# Gin's private names, all of them. `tests/gin_test.py` has the version that they are from.


def _bindings() -> Mapping[tuple[str, str], Mapping[str, Any]]:
    """(scope, selector) -> {parameter: value}; a macro's scope is its name."""
    # Gin shows its configuration only to finalising hooks. Its own hooks run before ours and raise
    # messages that list every binding.
    return gin_config._CONFIG


def _search_in(folders: Sequence[str]) -> None:
    """Replaces the folders in which gin looks for files and includes, in this order."""
    gin_config._LOCATION_PREFIXES[:] = folders


def parse(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    unbound: Mapping[str, str] | None = None,
) -> None:
    """Reads files, then bindings, in order, and locks the configuration.

    A shipped file (`gin/runs/eval.gin`) cannot be replaced by one of the current folder or of
    `search_paths`, neither here nor in an `include`. Begin a path with `./` to read such a file.

    Args:
      gin_files: paths, looked up below the shipped root, the current folder and `search_paths`.
      bindings: such as `TRAIN_STEPS = 10`.
      search_paths: folders.
      unbound: macro -> value, for used macros that nothing else binds, before `FROM_CHECKPOINT`.

    Raises:
      ConfigError: a file is missing or malformed, or macros and bindings do not fit together.
    """
    gin.clear_config()
    _search_in(_folders(search_paths))
    shipped.make_importable()
    # Gin logs an error for every folder that it searches in vain.
    search_noise = logging.getLogger()
    search_noise.addFilter(_is_not_search)
    try:
        for path in gin_files:
            with _errors_of_gin():
                gin.parse_config_file(_absolute(path))
        for binding in bindings:
            _parse_binding(binding)
        values = {name: FROM_CHECKPOINT[name] for name in _optional_macros()} | dict(unbound or {})
        missing = [name for name in missing_macros() if name in values]
        with _errors_of_gin():
            gin.parse_config([f"{name} = {values[name]}" for name in missing])
        check_macros()
        with _errors_of_gin():
            check_types()
            gin.finalize()
    finally:
        search_noise.removeFilter(_is_not_search)


def _folders(search_paths: Sequence[str]) -> list[str]:
    """The folders in which files and includes are looked up, in order."""
    return [str(shipped.root()), "", *search_paths]


def _absolute(path: str) -> str:
    """A path that begins with `./` as an absolute one, which is not looked up in folders."""
    return str(Path(path).absolute()) if path[:2] == "./" else path


def text_macros(
    gin_files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = ()
) -> dict[str, str]:
    """Macros whose value is text, without importing what the files configure.

    The arguments are those of `parse`. Files that it would reject may give no macros.
    """
    macros: dict[str, str] = {}

    def read(text: str) -> None:
        for statement in config_parser.ConfigParser(text, _Unresolved()):
            if isinstance(statement, config_parser.IncludeStatement):
                read_file(statement.filename)
            elif isinstance(statement, config_parser.BindingStatement) and not statement.arg_name:
                macros.pop(statement.selector, None)
                if isinstance(statement.value, str) and not statement.scope:
                    macros[statement.selector] = statement.value

    def read_file(path: str) -> None:
        places = [Path(folder, path) for folder in _folders(search_paths)]
        read(next(place for place in places if place.is_file()).read_text(encoding="utf-8"))

    try:
        for path in gin_files:
            read_file(_absolute(path))
        for binding in bindings:
            read(binding)
    except (SyntaxError, ValueError, OSError, StopIteration, RecursionError):
        return {}
    return macros


class _Unresolved(config_parser.ParserDelegate):
    """Leaves references and macros in values unresolved."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> object:
        return object()

    def macro(self, macro_name: str) -> object:
        return object()


@contextlib.contextmanager
def _errors_of_gin() -> Iterator[None]:
    """Turns gin's errors, all of which are about what a user wrote, into `ConfigError`."""
    try:
        yield
    except ConfigError:
        raise
    except RecursionError as error:
        # Gin's own message has a line for each level, and itself exceeds the limit.
        raise ConfigError("A gin file includes itself, or a value is nested too deeply.") from error
    except (
        tokenize.TokenError,
        MemoryError,
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


def _parse_binding(binding: str) -> None:
    name, _, value = (part.strip() for part in binding.partition("="))
    try:
        with _errors_of_gin():
            gin.parse_config(binding)
    except ConfigError as error:
        if value[:1] in ("@", "%") or _is_literal(value):
            raise
        raise ConfigError(
            f"{name}={value}: the value is not a Python literal. Text needs two pairs of quotes: "
            f"--gin.{name}=\"'{value}'\""
        ) from error


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def configures(function: Callable[..., Any]) -> bool:
    """Whether a gin file binds a parameter of the function."""
    place = f"{function.__module__}.{function.__name__}"
    return any(selector == place for _, selector in _bindings())


def configured(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its bindings applied.

    Raises:
      ConfigError: no gin file configures it, or one configures a class that nothing uses.
    """
    place = f"{function.__module__}.{function.__name__}"
    if not configures(function):
        raise ConfigError(f"No gin file configures {place}. Add one of gin/runs with --gin_file.")
    if idle := _unreferenced():
        raise ConfigError(
            f"{', '.join(idle)}: configured, but nothing uses it. Leave its gin file out, or add the one "
            "that uses it: a size of gin/sizes needs a model of gin/models."
        )
    configurable = gin.get_configurable(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return configurable(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 (raised again)
            # A plain `raise` keeps the cause, which `from` would replace.
            raise _without_proxy(error)  # noqa: B904

    return call


def _without_proxy(error: Exception) -> Exception:
    """The error itself, where gin raised a copy that has neither its `errno` nor its cause.

    gin adds the configurable's name to the message, in a class that keeps the error in a closure
    (`gin.utils.augment_exception_message_and_reraise`).
    """
    while True:
        cells = getattr(vars(type(error)).get("__getattr__"), "__closure__", None) or ()
        inner = [x.cell_contents for x in cells if isinstance(x.cell_contents, Exception)]
        if not inner:
            return error
        error = inner[0]


def settings(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that `configured(function)` would pass.

    Raises:
      ConfigError: no gin file configures it.
    """
    configured(function)
    return gin.get_bindings(function)


def complete_config() -> str:
    """All bindings, used or not, as a gin file."""
    return gin.config_str()


def operative_config() -> str:
    """The bindings used so far, as a gin file."""
    return gin.operative_config_str()


def first_line(error: object) -> str:
    """A message, or an error's, on one line, without the locations that gin appends."""
    text = str(error).strip() or type(error).__name__
    text = re.split(r"\n\s*(?:In (?:call to configurable|binding|file|bindings)|\n)", text)[0]
    return " ".join(text.split())


def name_macros(message: str) -> str:
    """A message about parameters, `beams must be …` or `beams=0 …`, with the macros that set them."""
    macros = {
        (parameter, value.config_key[0])
        for parameters in _bindings().values()
        for parameter, value in parameters.items()
        if isinstance(value, gin_config.ConfigurableReference)
        and value.config_key[1] == "gin.macro"
    }
    unnamed = {
        macro
        for parameter, macro in macros
        if re.search(rf"(?<![-.\w]){parameter}(?==| must (?:be|not) )", message)
        and not re.search(rf"\b{macro}\b", message)
    }
    return f"{message} (Set by {', '.join(sorted(unnamed))}.)" if unnamed else message


def _is_not_search(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Path not found")


def check_macros() -> None:
    """Raises ConfigError for macros that are bound but unused, or used but without a value."""
    used, bound = _macros()
    if unused := sorted(bound - used):
        raise ConfigError("; ".join(_unused(name, used) for name in unused))
    if missing := missing_macros():
        raise ConfigError(
            f"No value for {', '.join(missing)}. Set it in a gin file, or on the command line: "
            f"--gin.{missing[0]}=…"
        )


def missing_macros() -> list[str]:
    """Macros that are used but have no value."""
    used, bound = _macros()
    return sorted((used - bound) | {name for name in bound if _is_required(name)})


def _macros() -> tuple[set[str], set[str]]:
    """Macros that are used, and macros that are bound."""
    macro = gin.get_configurable("gin.macro")
    used = {ref.config_key[0] for ref in gin_config.iterate_references(_bindings(), to=macro)}
    return used, {scope for scope, selector in _bindings() if selector == "gin.macro"}


def _unreferenced() -> list[str]:
    """Names of classes with bindings that no other binding refers to; modes are functions."""
    referenced = {ref.config_key[1] for ref in gin_config.iterate_references(_bindings())}
    bound = {selector for _, selector in _bindings()} - referenced
    return sorted(
        selector.split(".")[-1]
        for selector in bound
        if inspect.isclass(gin.get_configurable(selector))
    )


def _optional_macros() -> set[str]:
    """Macros of `FROM_CHECKPOINT` that nothing binds, and whose parameters may all be None."""
    used, bound = _macros()
    optional = set(FROM_CHECKPOINT) & (used - bound)
    for (_, selector), parameters in _bindings().items():
        for parameter, value in parameters.items():
            if not isinstance(value, gin_config.ConfigurableReference):
                continue
            hint = _annotations(gin.get_configurable(selector)).get(parameter)
            if value.config_key[1:] == ("gin.macro",) and types.NoneType not in typing.get_args(
                hint
            ):
                optional.discard(value.config_key[0])
    return optional


def _unused(name: str, used: set[str]) -> str:
    close = difflib.get_close_matches(name, used, n=1)
    if RENAMED.get(name) in used:
        close = [RENAMED[name]]
    known = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(used))}."
    return f"{name} is set, but nothing uses it: {known}"


def _is_required(name: str) -> bool:
    return repr(_bindings()[name, "gin.macro"]["value"]) == "%gin.REQUIRED"


def check_types() -> None:
    """Raises ConfigError for a macro whose value is not of the annotated type of its parameter."""
    for (_, selector), parameters in _bindings().items():
        if selector == "gin.macro":
            continue
        hints = _annotations(gin.get_configurable(selector))
        for parameter, value in parameters.items():
            name = f"{selector.split('.')[-1]}.{parameter}"
            if isinstance(value, gin_config.ConfigurableReference):
                name, of_macro = value.config_key
                if of_macro != "gin.macro":
                    continue
                value = _bindings()[name, of_macro]["value"]
            if isinstance(value, str) and not value_types.is_text(value):
                raise ConfigError(f"{name} holds NUL or half of a surrogate pair: {value!r:.80}")
            hint = hints.get(parameter, Any)
            if isinstance(value, list | tuple):
                value = [x for x in value if not isinstance(x, gin_config.ConfigurableReference)]
            is_object = isinstance(value, gin_config.ConfigurableReference)
            if not is_object and not value_types.conforms(value, hint):
                raise ConfigError(
                    f"{name} must be {value_types.name_of(hint)}, got {value!r}. Set for example "
                    f"--gin.{name}={value_types.example(hint)}"
                )


def _annotations(configurable: Callable[..., Any]) -> dict[str, Any]:
    target = configurable.__init__ if inspect.isclass(configurable) else configurable
    return typing.get_type_hints(inspect.unwrap(target))
