"""What is launched, kept: the code as git sees it, and `launch.json` beside the run."""

import argparse
import ast
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from glimmer_jax.main import JOBS, parse_flags

# Run mode -> macro with the folder or file that it writes.
OUTPUTS = {
    "train": "MODEL_DIR",
    "eval": "EVAL_OUTPUT_DIR",
    "build_memory": "MEMORY_DIR",
    "passages": "PASSAGES_DIR",
    "retrieve": "DATA_DIR",
    "infer": "INFER_OUTPUT_DIR",
    "export": "OUTPUT_PATH",
    "codebooks": "OUTPUT_PATH",
    "memory": "MEMORY_DIR",
}
# Modes whose folder holds all of a run. The other outputs hold nothing that is not theirs.
INSIDE = ("train", "eval", "infer")


@dataclasses.dataclass(frozen=True)
class Code:
    """The working tree: what is committed, and what is not."""

    commit: str | None  # None: no checkout
    tree: str | None  # git's hash of all files that are not ignored
    diff: bytes  # from the commit to the tree, new files included; empty if there is none

    @property
    def diff_sha256(self) -> str | None:
        return hashlib.sha256(self.diff).hexdigest() if self.diff else None

    def annotations(self) -> dict[str, str]:
        """For manifests and comments."""
        named = {"glimmer/commit": self.commit, "glimmer/diff-sha256": self.diff_sha256}
        return {name: value for name, value in named.items() if value is not None}


def code(root: Path) -> Code:
    """The code in the checkout `root`; of an installed package nothing is known."""
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    # A package installed somewhere below another project's checkout is not that project.
    if top is None or commit is None or Path(_line(top)) != root.resolve():
        return Code(None, None, b"")
    # With an index of its own git takes in new files too, and the person's index stays as it is.
    with tempfile.TemporaryDirectory() as folder:
        git = functools.partial(_git, root, index=os.path.join(folder, "index"))
        git("read-tree", "HEAD")
        git("add", "--all")
        tree, diff = git("write-tree"), git("diff", "--cached", "--binary", "HEAD")
    assert tree is not None and diff is not None
    return Code(_line(commit), _line(tree), diff)


def archive_path(code: Code) -> str:
    """Where `pack` is told to put the code; the same code has the same path.

    Raises:
      ValueError: the code is not in a checkout.
    """
    if code.tree is None:
        raise ValueError(
            "This target ships the working tree and needs a git checkout, got an installed package. "
            "Clone the repository and launch from there, or use jobset with an image."
        )
    return os.path.join(tempfile.gettempdir(), f"glimmer-{code.tree[:16]}.tar.gz")


def pack(root: Path, code: Code, path: str) -> None:
    """Writes exactly the recorded code to a .tar.gz file."""
    assert code.tree is not None
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
        # Whole or not at all: the units of a sweep write the same file side by side.
        part = os.path.join(folder, "code.tar.gz")
        command = ["git", "-C", str(root), "archive", "--format=tar.gz", f"--output={part}"]
        subprocess.run([*command, code.tree], check=True)
        os.replace(part, path)


def output(flags: argparse.Namespace) -> str | None:
    """The folder or file that the run writes, where the command line names it.

    Args:
      flags: glimmer's, parsed.
    """
    text = _output(flags)
    return None if text is None else _literal(text)


def require_job(flags: argparse.Namespace, others: Sequence[str] = ()) -> None:
    """Refuses to start in many processes what is the work of one.

    Args:
      flags: glimmer's, parsed.
      others: modes that are let through all the same.

    Raises:
      ValueError: the mode is such work.
    """
    if flags.run_mode not in (*JOBS, *others):
        raise ValueError(
            f"--run_mode={flags.run_mode} is the work of one process, which needs no launcher. Run it "
            "on one machine: glimmer, and what stands after --."
        )


def require_bucket(flags: argparse.Namespace) -> None:
    """Refuses a run whose output would be lost with the machine, or may be.

    Raises:
      ValueError: the output is a path on the machine, or the command line does not name it.
    """
    text, path, macro = _output(flags), output(flags), OUTPUTS.get(flags.run_mode)
    if macro is None or (text is not None and text.strip() == "None"):
        return  # Nothing is written.
    if path is None:
        raise ValueError(
            f"The launcher must see on the command line where --run_mode={flags.run_mode} writes, "
            f"since the machine is deleted afterwards, and got {macro}={text or 'nothing'}; it looks "
            f"into no --gin_file. Add --gin.{macro}=\"'gs://BUCKET/RUN'\"."
        )
    if "://" not in path:
        raise ValueError(
            f"{macro}={path!r} would be deleted together with the machine; it must "
            "be in a bucket such as gs://BUCKET/RUN."
        )


def record_path(flags: argparse.Namespace) -> epath.Path:
    """Where `launch.json` goes: into the run's folder, beside other outputs, or else here."""
    path = output(flags)
    if path is None:
        return epath.Path("launch.json")
    if flags.run_mode in INSIDE:
        return epath.Path(path) / "launch.json"
    return epath.Path(path.rstrip("/") + ".launch.json")


def write(code: Code, argv: Sequence[str], flags: Sequence[str], plan: str) -> epath.Path:
    """Writes `launch.json` whole, and the diff beside it; an earlier record is set aside, not lost.

    Args:
      code: what runs.
      argv: of `python -m launch`.
      flags: the part of it that is glimmer's.
      plan: the plan's text.

    Returns:
      The record's path.

    Raises:
      ValueError: the disk or the bucket does not take it.
    """
    path = record_path(parse_flags(flags))
    try:
        _write(path, code, argv, plan)
    except Exception as error:
        if not _is_storage(error):
            raise
        login = (
            " This machine writes it itself: gcloud auth application-default login, and the right to "
            "write to the bucket."
        )
        raise ValueError(
            f"launch.json could not be written to {path}: {error}.{login if '://' in str(path) else ''}"
        ) from error
    return path


def _is_storage(error: Exception) -> bool:
    """Whether a disk or a bucket raised it; the names are TensorFlow's, gcsfs's and Google's."""
    names = {base.__name__ for base in type(error).__mro__}
    return not names.isdisjoint(("OSError", "OpError", "HttpError", "GoogleAuthError"))


def _write(path: epath.Path, code: Code, argv: Sequence[str], plan: str) -> None:
    """Writes the record to `path`; arguments as those of `write`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    if path.exists():
        _set_aside(path, now)
    record = {
        "time": now,
        "argv": list(argv),
        "commit": code.commit,
        "diff_sha256": code.diff_sha256,
        "plan": plan.splitlines(),
    }
    if code.diff_sha256 is not None:
        (path.parent / f"launch.{code.diff_sha256[:16]}.diff").write_bytes(code.diff)
    # Whole or not at all, and beside it, where alone it can be renamed at once.
    part = path.parent / f"{path.name}.partial"
    part.write_text(json.dumps(record, indent=2) + "\n")
    part.replace(path)


def _set_aside(path: epath.Path, now: str) -> None:
    """Renames the record of an earlier launch after its time; one that cannot be read, after ours."""
    try:
        time = json.loads(path.read_text())["time"]
    except (ValueError, KeyError, TypeError):
        aside = path.parent / f"{path.stem}.damaged.{now}.json"
        print(f"launch: {path} is damaged; it is kept as {aside}", flush=True)
    else:
        aside = path.parent / f"{path.stem}.{time}.json"
    path.rename(aside)


def bound(flags: argparse.Namespace, macro: str) -> str | None:
    """What the command line binds to a macro, as Python; None where it does not."""
    found = None
    for binding in flags.gin_bindings:
        name, _, value = binding.partition("=")
        if name.strip() == macro:
            found = value  # as in gin, the last one counts
    return found


def _output(flags: argparse.Namespace) -> str | None:
    macro = OUTPUTS.get(flags.run_mode)
    return None if macro is None else bound(flags, macro)


def _literal(text: str) -> str | None:
    """The string that gin would read, None where it is a macro or no string."""
    try:
        value = ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        return None
    return value if isinstance(value, str) else None


def _line(printed: bytes) -> str:
    return os.fsdecode(printed).rstrip("\n")


def _git(root: Path, *arguments: str, index: str | None = None) -> bytes | None:
    """What git prints; None where there is no git, or no checkout."""
    environment = dict(os.environ) if index is None else {**os.environ, "GIT_INDEX_FILE": index}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            check=False,
            capture_output=True,
            env=environment,
        )
    except FileNotFoundError:
        return None
    return None if done.returncode else done.stdout
