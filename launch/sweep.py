"""A sweep as data: one launch command per unit, with its own values, folder and name."""

import ast
import dataclasses
import itertools
import os
import re
from collections.abc import Sequence
from typing import Any

from glimmer_jax.main import parse_flags
from launch import record
from launch.plans import Argv, check_at_least, check_name, shell

_MACRO = re.compile(r"[A-Za-z_][\w./]*")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Launch commands for XManager."""

    units: tuple[Argv, ...]  # arguments of `python -m launch`
    parallel: int  # units at a time

    def text(self) -> str:
        """The sweep as `--dry_run` prints it."""
        head = f"# XManager, {len(self.units)} units, {self.parallel} at a time\n"
        return head + "".join(
            f"{shell(('python', '-m', 'launch', *unit))}\n" for unit in self.units
        )


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """`"TEMPERATURE=[0.5, 1.0]"` -> `("TEMPERATURE", [0.5, 1.0])`.

    Raises:
      ValueError: another form, or no values.
    """
    name, _, values = text.partition("=")
    try:
        parsed = ast.literal_eval(values)
    except (SyntaxError, ValueError):
        parsed = None
    if not _MACRO.fullmatch(name) or not isinstance(parsed, list) or not parsed:
        raise ValueError(
            f"--sweep must be NAME=[VALUE, VALUE] with Python values, got {text!r}. Quote strings, and "
            "quote the argument for the shell."
        )
    return name, parsed


def plan(
    axes: Sequence[tuple[str, list[Any]]],
    target: Sequence[str],
    name: str | None,
    flags: Sequence[str],
    parallel: int,
) -> Sweep:
    """One unit for each combination of the axes' values; one unit without axes.

    Args:
      axes: gin name and values.
      target: a launch command without glimmer's flags: `["local", "--num_processes=2"]`.
      name: of the target's machines, to which each unit appends its number; None: no name.
      flags: of glimmer; they bind the folder of the sweep, to which each unit appends its number, or a
        parameter file, whose name it goes into.
      parallel: units at a time.

    Raises:
      ValueError: no folder, or a duplicate name.
    """
    check_at_least(1, parallel=parallel)
    names = [axis for axis, _ in axes]
    if len(set(names)) < len(names):
        raise ValueError(f"--sweep must name each axis once, got {', '.join(names)}.")
    parsed = parse_flags(flags)
    folder, macro = record.output(parsed), record.OUTPUTS.get(parsed.run_mode)
    if folder is None or macro is None or macro in names:
        raise ValueError(
            f"A sweep needs --gin.{macro or 'MODEL_DIR'}=\"'FOLDER'\" on the command line: unit 1 "
            "writes FOLDER/1, and so on; for a file NAME.safetensors it writes NAME-1.safetensors."
        )
    units = []
    for number, values in enumerate(itertools.product(*(v for _, v in axes)), start=1):
        changed: dict[str, Any] = dict(zip(names, values, strict=True))
        stem, suffix = os.path.splitext(folder)
        is_file = suffix == ".safetensors"
        changed[macro] = f"{stem}-{number}{suffix}" if is_file else f"{folder}/{number}"
        # As in gin, the last binding counts.
        own = target if name is None else [*target, f"--name={check_name(f'{name}-{number}')}"]
        bindings = [f"--gin.{axis}={value!r}" for axis, value in changed.items()]
        units.append((*own, "--", *flags, *bindings))
    return Sweep(tuple(units), parallel)
