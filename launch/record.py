"""The record of a launch: the code according to git, and `launch.json` beside the run."""

import argparse
import ast
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from glimmer_jax.main import JOBS, parse_flags
from glimmer_jax.storage import folder

# Run mode -> the macro that names its output folder or file.
OUTPUTS = {
    "train": "MODEL_DIR",
    "eval": "EVAL_OUTPUT_DIR",
    "build_memory": "MEMORY_DIR",
    "passages": "PASSAGES_DIR",
    "retrieve": "DATA_DIR",
    "cache": "CACHE_DIR",
    "infer": "INFER_OUTPUT_DIR",
    "export": "OUTPUT_PATH",
    "codebooks": "OUTPUT_PATH",
    "memory": "MEMORY_DIR",
}
HIDDEN = "***"
# Modes whose output folder also holds the record; other outputs contain only their own files.
INSIDE = ("train", "eval", "infer")


@dataclasses.dataclass(frozen=True)
class Code:
    """The working tree: its commit, and the changes since."""

    commit: str | None  # None: not a checkout
    tree: str | None  # git's hash of all files that are not ignored
    diff: bytes  # from the commit to the tree, including new files; may be empty

    @property
    def diff_sha256(self) -> str | None:
        """SHA-256 of the diff; None without changes."""
        return hashlib.sha256(self.diff).hexdigest() if self.diff else None

    def annotations(self) -> dict[str, str]:
        """Identify the code in manifests and comments."""
        named = {"glimmer/commit": self.commit, "glimmer/diff-sha256": self.diff_sha256}
        return {name: value for name, value in named.items() if value is not None}


def code(root: Path) -> Code:
    """The code of the checkout `root`; all fields are empty for an installed package.

    Raises:
      ValueError: git cannot read the checkout, or a file that it does not ignore.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None and (root / ".git").exists():
        raise ValueError(
            f"{root} is a checkout, but git cannot read it, so that the code of this run could not be "
            f"recorded. See what git -C {root} status says: git may be missing, or the checkout may "
            "belong to another user (git config --global --add safe.directory)."
        )
    commit = _git(root, "rev-parse", "HEAD")
    # A package installed below another project's checkout is not that project.
    if top is None or commit is None or Path(_line(top)) != root.resolve():
        return Code(None, None, b"")
    # With a separate index git includes new files and leaves the user's index unchanged.
    with tempfile.TemporaryDirectory() as temporary:
        git = functools.partial(_git, root, index=os.path.join(temporary, "index"))
        tree = diff = None
        # A step that fails would leave changes out of what runs and of its record.
        if git("read-tree", "HEAD") is not None and git("add", "--all") is not None:
            tree, diff = git("write-tree"), git("diff", "--cached", "--binary", "HEAD")
    if tree is None or diff is None:
        raise ValueError(
            f"git could not read all files of {root}. Run git add --all --dry-run there, and remove or "
            "ignore what it complains about."
        )
    return Code(_line(commit), _line(tree), diff)


def archive_path(code: Code) -> str:
    """The path for `pack`; the same code has the same path.

    Raises:
      ValueError: the code is not in a checkout.
    """
    if code.tree is None:
        raise ValueError(
            "This target ships the working tree and needs a git checkout, got an installed package. "
            "Clone the repository and launch from there, or use jobset with an image."
        )
    # One per user: nobody may replace another's file.
    return os.path.join(tempfile.gettempdir(), f"glimmer-{os.getuid()}-{code.tree[:16]}.tar.gz")


def pack(root: Path, code: Code, path: str) -> None:
    """Writes the recorded code to a .tar.gz file, readable by its owner alone."""
    assert code.tree is not None
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as temporary:
        # Atomically: the units of a sweep write the same file in parallel.
        part = os.path.join(temporary, "code.tar.gz")
        command = ["git", "-C", str(root), "archive", "--format=tar.gz", f"--output={part}"]
        if subprocess.run([*command, code.tree], check=False).returncode:
            raise ValueError(f"git could not pack the code into {part}. Is the disk full?")
        os.chmod(part, 0o600)
        os.replace(part, path)


def output(flags: argparse.Namespace) -> str | None:
    """The output folder or file of the run, if the command line names it.

    Args:
      flags: glimmer's, parsed.
    """
    text = _output(flags)
    return None if text is None else _literal(text)


def require_job(flags: argparse.Namespace, others: Sequence[str] = ()) -> None:
    """Rejects single-process modes.

    Args:
      flags: glimmer's, parsed.
      others: modes that are allowed as well.

    Raises:
      ValueError: the mode runs in one process.
    """
    if flags.run_mode not in (*JOBS, *others):
        raise ValueError(
            f"--run_mode={flags.run_mode} runs in one process and needs no launcher. Run it on one "
            "machine: glimmer, followed by the flags after --."
        )


def require_bucket(flags: argparse.Namespace) -> None:
    """Rejects a run whose output would be deleted with the machine.

    Raises:
      ValueError: the output is a local path, or the command line does not name it.
    """
    text, path, macro = _output(flags), output(flags), OUTPUTS.get(flags.run_mode)
    if macro is None or (text is not None and text.strip() == "None"):
        return  # Nothing is written.
    if path is None:
        raise ValueError(
            f"{macro} must be on the command line of --run_mode={flags.run_mode}, since the machine "
            f"is deleted afterwards, got {text or 'nothing'}; the launcher reads no gin files. Add "
            f"--gin.{macro}=\"'gs://BUCKET/RUN'\"."
        )
    if "://" not in path:
        raise ValueError(
            f"{macro}={path!r} would be deleted with the machine. Choose a path in a bucket such as "
            "gs://BUCKET/RUN."
        )


def record_path(flags: argparse.Namespace) -> str:
    """The path of `launch.json`: in the run's folder, beside other outputs, or in this folder."""
    path = output(flags)
    if path is None:
        return "launch.json"
    if flags.run_mode in INSIDE:
        return os.path.join(path, "launch.json")
    return path.rstrip("/") + ".launch.json"


def write(code: Code, argv: Sequence[str], flags: Sequence[str], plan: str) -> str:
    """Writes `launch.json` and, beside it, the diff; the record of a previous launch is kept.

    Local files are readable by their owner alone.

    Args:
      code: what runs.
      argv: of `python -m launch`, from `without_secrets`.
      flags: the part of it that is glimmer's.
      plan: the plan's text, without secrets too.

    Returns:
      The record's path.

    Raises:
      ValueError: the disk or the bucket cannot be written.
    """
    path = record_path(parse_flags(flags))
    try:
        _write(path, code, argv, plan)
    except OSError as error:
        login = (
            " This machine writes it itself: run gcloud auth application-default login, and allow it to "
            "write to the bucket."
        )
        raise ValueError(
            f"launch.json could not be written to {path}: {error}.{login if '://' in path else ''}"
        ) from error
    return path


def _write(path: str, code: Code, argv: Sequence[str], plan: str) -> None:
    """Writes the record to `path`; arguments as those of `write`."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    previous = folder.read_file(*folder.of_file(path))
    if previous is not None:
        _keep(path, previous, now)
    record = {
        "time": now,
        "argv": list(argv),
        "commit": code.commit,
        "diff_sha256": code.diff_sha256,
        "plan": plan.splitlines(),
    }
    if code.diff_sha256 is not None:
        _write_private(_beside(path, f"launch.{code.diff_sha256[:16]}.diff"), code.diff)
    _write_private(path, (json.dumps(record, indent=2) + "\n").encode())


def _keep(path: str, previous: bytes, now: str) -> None:
    """Copies the record of a previous launch to a name with its time; a damaged one to ours."""
    stem = os.path.basename(path).removesuffix(".json")
    try:
        time = json.loads(previous)["time"]
        if not re.fullmatch(r"\d{8}T\d{6}\.\d{6}Z", time):
            raise ValueError(f"{time!r} is no time")
        copy = _beside(path, f"{stem}.{time}.json")
    except (ValueError, KeyError, TypeError, RecursionError):
        copy = _beside(path, f"{stem}.damaged.{now}.json")
        print(f"launch: {path} is damaged; it is kept as {copy}", flush=True)
    _write_private(copy, previous)


def _beside(path: str, name: str) -> str:
    return os.path.join(os.path.dirname(path), name)


def _write_private(path: str, data: bytes) -> None:
    with folder.writing(path, private=True) as file:
        file.write(data)


def without_secrets(argv: Sequence[str]) -> list[str]:
    """The arguments of a launch without the values of `--env`, which may be secret."""
    shown, is_variable = [], False
    for part in argv:
        prefix, _, variable = ("", "", part) if is_variable else part.partition("--env=")
        if is_variable or (not prefix and part.startswith("--env=")):
            name, equals, _ = variable.partition("=")
            part = f"{'' if is_variable else '--env='}{name}{equals}{HIDDEN if equals else ''}"
        is_variable = part == "--env"
        shown.append(part)
    return shown


def bound(flags: argparse.Namespace, macro: str) -> str | None:
    """The Python text that the command line binds to a macro, or None."""
    bound_text = None
    for binding in flags.gin_bindings:
        name, _, value = binding.partition("=")
        if name.strip() == macro:
            bound_text = value  # As in gin, the last one counts.
    return bound_text


def _output(flags: argparse.Namespace) -> str | None:
    macro = OUTPUTS.get(flags.run_mode)
    return None if macro is None else bound(flags, macro)


def _literal(text: str) -> str | None:
    """The string that gin would read; None for a macro or another type."""
    try:
        value = ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        return None
    return value if isinstance(value, str) else None


def _line(printed: bytes) -> str:
    return os.fsdecode(printed).rstrip("\n")


def _git(root: Path, *arguments: str, index: str | None = None) -> bytes | None:
    """The output of git; None without git or a checkout."""
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
