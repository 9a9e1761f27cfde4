"""Collects every documented object of the running interpreter's standard library.

Modules, classes, functions, methods and properties come from imports and `inspect`, the language
reference from `pydoc_data.topics`. The list depends only on the Python version, not on hash seeds,
import order or the machine: names are sorted, and defaults without a portable spelling are elided.

A new isolated process of the same interpreter collects the objects. In the calling process,
libraries may have rewritten docstrings of the standard library, and importing three hundred modules
would have side effects. This file is the program of that process, so it imports nothing from the
project.
"""

import contextlib
import dataclasses
import enum
import importlib
import inspect
import io
import json
import pkgutil
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

# Modules with side effects on import, graphical or platform-specific modules, copies of other
# modules, and distutils, which newer Pythons have only through setuptools. fmt: off
SKIPPED = frozenset(
    {
        "__main__",
        "antigravity",
        "distutils",
        "genericpath",
        "idlelib",
        "lib2to3",
        "msilib",
        "msvcrt",
        "nt",
        "ntpath",
        "nturl2path",
        "posix",
        "pydoc_data",
        "readline",
        "rlcompleter",
        "sre_compile",
        "sre_constants",
        "sre_parse",
        "test",
        "this",
        "tkinter",
        "turtle",
        "turtledemo",
        "winreg",
        "winsound",
    }
)
# fmt: on
_WITHOUT_SUBMODULES = frozenset({"encodings", "ensurepip"})
_SKIPPED_SUBMODULES = re.compile(r"\.(_\w*|tests?|__main__)(\.|$)")
# Documented names of modules.
_ALIASES = {"posixpath": "os.path", "builtins": ""}
_IMPORT_FAILURES = (ImportError, OSError, AttributeError, RuntimeError, SystemExit)


@dataclasses.dataclass(frozen=True)
class Documented:
    """One documented object.

    Attributes:
      name: qualified name (`json.dumps`, `str.join`, `topics.assert`).
      module: the module that exports it (`json`, `builtins`, `topics`).
      kind: module, class, function (or method), property or topic.
      signature: `dumps(obj, *, skipkeys=False)`, or "" if unknown.
      parameters: (name, default as in the signature or None) of the parameters without a star.
      doc: the docstring, before normalisation.
    """

    name: str
    module: str
    kind: str
    signature: str
    parameters: tuple[tuple[str, str | None], ...]
    doc: str


def documented_objects() -> list[Documented]:
    """All documented objects, collected by a new process of this interpreter.

    Raises:
      RuntimeError: the process failed.
    """
    command = [sys.executable, "-I", "-S", "-X", "utf8", "-W", "ignore", __file__]
    result = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if result.returncode:
        raise RuntimeError(
            f"Reading the documentation with {' '.join(command)} failed: "
            f"{result.stderr.decode(errors='replace')[-500:]}"
        )
    objects = []
    for fields in json.loads(result.stdout):
        fields["parameters"] = tuple((name, default) for name, default in fields["parameters"])
        objects.append(Documented(**fields))
    return objects


def read_objects() -> list[Documented]:
    """All documented objects of this process, one per docstring, sorted by module and name.

    A docstring with several names (re-exports, copies in subclasses) keeps one: the name with the
    fewest parts, then the shortest, then the alphabetically first.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        objects = [item for module in _modules() for item in _module_objects(module)]
        objects.extend(_topics())
    best: dict[str, Documented] = {}
    for item in sorted(objects, key=_preference):
        best.setdefault(" ".join(item.doc.split()).lower(), item)
    names: dict[str, Documented] = {}
    for item in best.values():
        names.setdefault(item.name, item)
    return sorted(names.values(), key=lambda item: (item.module, item.name))


def _preference(item: Documented) -> tuple[bool, int, int, str, str]:
    return item.kind == "property", item.name.count("."), len(item.name), item.name, item.module


def _modules() -> Iterator[tuple[str, types.ModuleType]]:
    for name in sorted(sys.stdlib_module_names):
        if name in SKIPPED or name.startswith(("_", "xx")):
            continue
        module = _import(name)
        if module is None:
            continue
        yield name, module
        paths = getattr(module, "__path__", None)
        if paths is None or name in _WITHOUT_SUBMODULES:
            continue
        for child in sorted(_submodules(paths, name + ".")):
            submodule = _import(child)
            if submodule is not None:
                yield child, submodule


def _submodules(paths: Any, prefix: str) -> Iterator[str]:
    # Not pkgutil.walk_packages, which imports a package before it can be skipped.
    for info in pkgutil.iter_modules(paths, prefix):
        if _SKIPPED_SUBMODULES.search(info.name):
            continue
        yield info.name
        if info.ispkg:
            package = _import(info.name)
            if package is not None:
                yield from _submodules(package.__path__, info.name + ".")


def _import(name: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(name)
    except _IMPORT_FAILURES:
        return None


def _module_objects(named: tuple[str, types.ModuleType]) -> Iterator[Documented]:
    module_name, module = named
    shown = _ALIASES.get(module_name, module_name)
    if _doc(module) and shown:
        yield Documented(shown, module_name, "module", "", (), _doc(module))
    exported = getattr(module, "__all__", None)
    names = exported if exported is not None else [n for n in vars(module) if n[:1] != "_"]
    for name in sorted(set(names)):
        thing = getattr(module, name, None)
        if exported is None and not _is_own(thing, module_name):
            continue
        qualified = f"{shown}.{name}" if shown else name
        if inspect.isclass(thing):
            yield from _class_objects(thing, qualified, module_name)
        elif inspect.isroutine(thing) and _doc(thing):
            yield _routine(thing, qualified, module_name, "function")


def _is_own(thing: Any, module_name: str) -> bool:
    home = getattr(thing, "__module__", None) or ""
    return home == module_name or home.lstrip("_").split(".")[0] == module_name


def _class_objects(cls: type, qualified: str, module_name: str) -> Iterator[Documented]:
    if _doc(cls):
        yield _routine(cls, qualified, module_name, "class")
    for name in sorted(vars(cls)):
        if name.startswith("_"):
            continue
        thing = vars(cls)[name]
        if isinstance(thing, (staticmethod, classmethod)):
            thing = thing.__func__
        if isinstance(thing, property) or inspect.isdatadescriptor(thing):
            if _doc(thing):
                full = f"{qualified}.{name}"
                yield Documented(full, module_name, "property", "", (), _doc(thing))
        elif inspect.isroutine(thing) and _doc(thing):
            yield _routine(thing, f"{qualified}.{name}", module_name, "function")


def _doc(thing: Any) -> str:
    doc = getattr(thing, "__doc__", None)
    return inspect.cleandoc(doc) if isinstance(doc, str) else ""


def _routine(thing: Any, qualified: str, module_name: str, kind: str) -> Documented:
    parameters, plain = _parameters(thing)
    bare = qualified.rsplit(".", 1)[-1]
    signature = "" if parameters is None else f"{bare}({', '.join(parameters)})"
    doc = _doc(thing)
    return Documented(qualified, module_name, kind, signature, tuple(plain), doc)


def _parameters(thing: Any) -> tuple[list[str] | None, list[tuple[str, str | None]]]:
    try:
        signature = inspect.signature(thing)
    except (ValueError, TypeError, AttributeError):
        return None, []
    shown: list[str] = []
    plain: list[tuple[str, str | None]] = []
    before = None
    for index, parameter in enumerate(signature.parameters.values()):
        if index == 0 and parameter.name in ("self", "cls", "$self", "type", "mcls", "metacls"):
            continue
        if before == parameter.POSITIONAL_ONLY != parameter.kind:
            shown.append("/")
        if parameter.kind == parameter.KEYWORD_ONLY and before not in (
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        ):
            shown.append("*")
        before = parameter.kind
        default = None
        if parameter.default is not parameter.empty:
            default = _spelled(parameter.default)
        text = parameter.name if default is None else f"{parameter.name}={default}"
        star = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
        shown.append(star + text)
        if not star:
            plain.append((parameter.name, default))
    if before == inspect.Parameter.POSITIONAL_ONLY:
        shown.append("/")
    return shown, plain


def _spelled(default: Any) -> str:
    """The default as written in a signature, if short and the same on every machine, else `...`."""
    if isinstance(default, enum.Enum):
        return f"{type(default).__name__}.{default.name}"
    if inspect.isclass(default) or inspect.isroutine(default):
        return str(getattr(default, "__qualname__", "...")).replace("<lambda>", "...")
    simple = (type(None), bool, int, float, str, bytes)
    known = isinstance(default, simple) or (
        isinstance(default, (tuple, list)) and all(isinstance(x, simple) for x in default)
    )
    if not known and default != {}:
        return "..."
    text = repr(default)
    # Long defaults would crowd out the docstring, and absolute paths depend on the machine. The
    # length is that of the repr, since control characters are longer when escaped.
    return text if len(text) <= 24 and not text[1:].startswith("/") and " " not in text else "..."


def _topics() -> Iterator[Documented]:
    topics = _import("pydoc_data.topics")
    if topics is None:
        return
    for name, text in sorted(topics.topics.items()):
        yield Documented(f"topics.{name}", "topics", "topic", "", (), text)


if __name__ == "__main__":
    print(json.dumps([dataclasses.asdict(item) for item in read_objects()]))
