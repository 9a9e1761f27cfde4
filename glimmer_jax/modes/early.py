"""Checks of settings that need neither JAX nor seqio, which take seconds to import."""

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from glimmer_jax import shipped

# A module of tasks may assign this name a literal tuple of the tasks and mixtures that it registers.
NAMES = "NAMES"


class InvalidSetting(ValueError):
    """A setting that no import can make valid."""


def check(macros: Mapping[str, str]) -> None:
    """Checks paths of checkpoints, and the name of the task if its module declares its `NAMES`.

    Args:
      macros: those whose value is text.

    Raises:
      InvalidSetting: a local checkpoint is missing, or the task's module does not declare it.
    """
    if (path := macros.get("CHECKPOINT_PATH")) is not None:
        existing_checkpoint("CHECKPOINT_PATH", path)
    path = macros.get("INITIAL_CHECKPOINT_PATH")
    # A resumed run does not need its initial checkpoint any more.
    if path is not None and not _may_resume(macros.get("MODEL_DIR")):
        existing_checkpoint("INITIAL_CHECKPOINT_PATH", path)
    name, module = macros.get("MIXTURE_OR_TASK_NAME"), macros.get("MIXTURE_OR_TASK_MODULE")
    if name is not None and module is not None:
        names = declared_names(module)
        if names is not None and name not in names:
            raise InvalidSetting(
                f"MIXTURE_OR_TASK_NAME: {module} registers no mixture or task {name!r}; it registers "
                f"{', '.join(names)}. Check MIXTURE_OR_TASK_NAME and MIXTURE_OR_TASK_MODULE."
            )


def existing_checkpoint(name: str, path: str) -> None:
    """Raises InvalidSetting for a missing local checkpoint; buckets are checked when opened."""
    if "://" not in str(path) and not Path(path).exists():
        raise InvalidSetting(f"{name}: there is no checkpoint {path}. Check the path.")


def _may_resume(model_dir: str | None) -> bool:
    """Whether the run may have a checkpoint of its own; true for a bucket, which is not read."""
    if model_dir is None or "://" in model_dir:
        return model_dir is not None
    checkpoints = Path(model_dir) / "checkpoints"
    return checkpoints.is_dir() and any(checkpoints.iterdir())


def declared_names(module: str) -> tuple[str, ...] | None:
    """The `NAMES` in the source of a module, which is not imported; None where there are none."""
    shipped.make_importable()
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # noqa: BLE001 - whatever the user's package raises
        return None  # Reported when the mode imports it.
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        statements = ast.parse(Path(spec.origin).read_bytes()).body
    except (SyntaxError, ValueError, OSError, RecursionError):
        return None  # So is this.
    for node in statements:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == NAMES:
            try:
                return tuple(str(name) for name in ast.literal_eval(node.value))
            except (ValueError, TypeError):
                return None
    return None
