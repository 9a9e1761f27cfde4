"""What a launch would do, as data: argument lists, scripts, manifests. Nothing here starts anything.

`--dry_run` prints a plan's `text()`, and the tests compare it with what is written down.
"""

import dataclasses
import re
import shlex
from collections.abc import Sequence

Argv = tuple[str, ...]

# Kubernetes makes names of pods from it, which end at 63 letters, and TPU VMs have the same rule.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
# Zones, types, versions, images, times: whatever a shell, a script line or a label takes as it is.
_WORD = re.compile(r"[A-Za-z0-9][-A-Za-z0-9._:/@]*")

# What a shell takes as the name of a variable.
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_FLAG = re.compile(r"--[\w.-]+=(?=.)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Together:
    """Processes of one job on this machine; the first failure is the job's."""

    processes: tuple[Argv, ...]

    def text(self) -> str:
        return lines(*self.processes)


@dataclasses.dataclass(frozen=True)
class Submission:
    """A job given to a scheduler, which starts it again by itself."""

    submit: Argv
    stdin: str  # script or manifest that `submit` reads
    follow: tuple[Argv, ...]  # for the person to run: state and logs

    def text(self) -> str:
        return f"{self.stdin}# given to:\n{lines(self.submit)}# then:\n{lines(*self.follow)}"


@dataclasses.dataclass(frozen=True)
class Machines:
    """Machines that are made for a job, and deleted after it, whatever happened."""

    name: str
    create: Argv
    describe: Argv  # prints the state; fails where there is no machine of the name
    ready: str  # the state in which it can be used
    waiting: tuple[str, ...]  # states on the way there; in every other one it is gone
    lost: tuple[str, ...]  # of these others, those that new machines may be spared
    explain: Argv  # prints all there is to know, such as why they could not be made
    ship: tuple[Argv, ...]  # code and environment
    run: Argv  # ends with the job's exit code
    delete: Argv
    recreate: int  # times that lost machines are made again

    def text(self) -> str:
        return (
            f"# must say NOT_FOUND: else the name is not free, and nothing is done\n"
            f"{lines(self.describe)}"
            f"# create; lost machines are made again, {self.recreate} times at most\n"
            f"{lines(self.create)}"
            f"# until it prints {self.ready}, while it prints {', '.join(self.waiting)}\n"
            f"{lines(self.describe)}"
            f"# if it prints neither of them nor {', '.join(self.lost)}: why; then no new ones\n"
            f"{lines(self.explain)}"
            f"# ship\n{lines(*self.ship)}"
            f"# run on all workers\n{lines(self.run)}"
            f"# delete, whatever happened\n{lines(self.delete)}"
        )


Plan = Together | Submission | Machines


def lines(*argvs: Argv) -> str:
    """Commands as one would type them, a line each."""
    return "".join(shell(argv) + "\n" for argv in argvs)


def shell(argv: Argv) -> str:
    """One line that any POSIX shell splits into `argv`; quotes stand after the name of a flag."""
    return " ".join(_quoted(part) for part in argv)


def _quoted(part: str) -> str:
    flag = _FLAG.match(part)
    return shlex.quote(part) if flag is None else flag[0] + shlex.quote(part[flag.end() :])


def glimmer(python: str, flags: Sequence[str], env: Sequence[str] = ()) -> Argv:
    """The job's command, in `env` (NAME=VALUE); where it runs tells it that it has neighbours."""
    before = ("env", *env) if env else ()
    return (*before, python, "-m", "glimmer_jax.main", "--distributed", *flags)


def check_name(value: str) -> str:
    """`value`, a name that every cloud takes.

    Raises:
      ValueError: it is none.
    """
    if not _NAME.fullmatch(value):
        raise ValueError(
            f"--name must be 1 to 40 lower-case letters, digits and dashes, a letter first, got "
            f"{value!r}. Choose another."
        )
    return value


def check_words(**values: str | None) -> None:
    """Refuses what a shell, a script line or a label would not take as it is; None is left out.

    Raises:
      ValueError: names the option.
    """
    for name, value in values.items():
        if value is not None and not _WORD.fullmatch(value):
            raise ValueError(
                f"--{name} must be letters, digits and any of '-._:/@', a letter or digit first, "
                f"got {value!r}. Remove the rest."
            )


def check_env(env: Sequence[str]) -> None:
    """Refuses what is not NAME=VALUE.

    Raises:
      ValueError: names it.
    """
    for variable in env:
        if not _VARIABLE.fullmatch(variable):
            raise ValueError(
                "--env must be NAME=VALUE, the name of letters, digits and underscores and no digit "
                f"first, got {variable!r}."
            )


def check_at_least(least: int, **values: int) -> None:
    """Refuses numbers below `least`.

    Raises:
      ValueError: names the option.
    """
    for name, value in values.items():
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}. Raise it.")
