"""Where the shipped gin files, tasks and launchers are: beside the package, or inside a wheel."""

import sys
from pathlib import Path

PACKAGE = Path(__file__).parent
CHECKPOINTS = PACKAGE / "checkpoints"  # of our own training; its README.md is the model card


def root() -> Path:
    """The folder that holds `gin/`, `tasks/` and `launch/`."""
    checkout = PACKAGE.parent
    return checkout if (checkout / "gin" / "runs").is_dir() else PACKAGE / "_shipped"


def make_importable() -> None:
    """Lets `import tasks.pydocs` work from any folder; modules found elsewhere come first.

    A working directory with its own `tasks/` is meant by whoever stands in it.
    """
    for path in (str(Path.cwd()), str(root())):
        if path not in sys.path:
            sys.path.append(path)
