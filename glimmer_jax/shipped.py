"""The location of the gin files, tasks and launchers: beside the package, or inside a wheel."""

import sys
from pathlib import Path

PACKAGE = Path(__file__).parent
CHECKPOINTS = PACKAGE / "checkpoints"  # trained on the built-in corpus; README.md is the model card


def root() -> Path:
    """The folder that holds `gin/`, `tasks/` and `launch/`."""
    checkout = PACKAGE.parent
    return checkout if (checkout / "gin" / "runs").is_dir() else PACKAGE / "_shipped"


def make_importable() -> None:
    """Makes `import tasks.pydocs` work from any folder.

    Modules found elsewhere come first: a `tasks/` folder in the working directory wins.
    """
    for path in (str(Path.cwd()), str(root())):
        if path not in sys.path:
            sys.path.append(path)
