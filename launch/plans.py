"""Plans of launches as data: argument lists, scripts, manifests. Nothing here starts a process.

`--dry_run` prints a plan's `text()`, which the tests compare with golden files.
"""

import dataclasses
import re
import shlex
from collections.abc import Sequence

Argv = tuple[str, ...]

# Kubernetes derives names of pods from it, of at most 63 letters; TPU VMs have the same rule.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
# Zones, types, versions, images, times: words that shells, scripts and labels take without quotes.
_WORD = re.compile(r"[A-Za-z0-9][-A-Za-z0-9._:/@]*")

# The name is one that shells accept.
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
FINAL_SAVE = 120  # seconds that a job has from SIGTERM to SIGKILL or the time limit

_FLAG = re.compile(r"--[\w.-]+=(?=.)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class LocalPlan:
    """Processes of one job on this machine; the first failure is that of the job."""

    processes: tuple[Argv, ...]

    def text(self) -> str:
        """The plan as `--dry_run` prints it."""
        return lines(*self.processes)


@dataclasses.dataclass(frozen=True)
class SubmitPlan:
    """A job submitted to a scheduler, which restarts it."""

    submit: Argv
    stdin: str  # script or manifest, read by `submit`
    follow: tuple[Argv, ...]  # commands for state and logs, shown to the user

    def text(self) -> str:
        """The plan as `--dry_run` prints it."""
        submit, follow = lines(self.submit), lines(*self.follow)
        return f"{self.stdin}# submitted with:\n{submit}# next commands:\n{follow}"


@dataclasses.dataclass(frozen=True)
class TpuPlan:
    """TPU machines that are created for a job and always deleted after it."""

    name: str
    create: Argv
    describe: Argv  # prints the state; fails if no machine has the name
    ready: str  # the state in which they can be used
    waiting: tuple[str, ...]  # states before `ready`; in all others the machines are gone
    lost: tuple[str, ...]  # those of the other states after which new machines may succeed
    explain: Argv  # prints the full description, such as why creation failed
    ship: tuple[Argv, ...]  # code and environment
    run: Argv  # exits with the job's code
    delete: Argv
    recreate: int  # times that lost machines are created again

    def text(self) -> str:
        """The plan as `--dry_run` prints it."""
        return (
            f"# must print NOT_FOUND: otherwise the name is taken, and nothing happens\n"
            f"{lines(self.describe)}"
            f"# create; lost machines are created again, at most {self.recreate} times\n"
            f"{lines(self.create)}"
            f"# until it prints {self.ready}, while it prints {', '.join(self.waiting)}\n"
            f"{lines(self.describe)}"
            f"# if it prints neither these nor {', '.join(self.lost)}: describe, and give up\n"
            f"{lines(self.explain)}"
            f"# ship\n{lines(*self.ship)}"
            f"# run on all workers\n{lines(self.run)}"
            f"# delete, in any case\n{lines(self.delete)}"
        )


Plan = LocalPlan | SubmitPlan | TpuPlan


def lines(*argvs: Argv) -> str:
    """Commands as typed into a shell, one per line."""
    return "".join(shell(argv) + "\n" for argv in argvs)


def shell(argv: Argv) -> str:
    """One line that POSIX shells split into `argv`; quotes begin after the name of a flag."""
    return " ".join(_quoted(part) for part in argv)


def _quoted(part: str) -> str:
    flag = _FLAG.match(part)
    return shlex.quote(part) if flag is None else flag[0] + shlex.quote(part[flag.end() :])


def glimmer(python: str, flags: Sequence[str], env: Sequence[str] = ()) -> Argv:
    """The job's command with `env` (NAME=VALUE). The environment describes the other processes."""
    before = ("env", *env) if env else ()
    return (*before, python, "-m", "glimmer_jax.main", "--distributed", *flags)


def check_name(value: str) -> str:
    """`value`, if it is a name that every cloud accepts.

    Raises:
      ValueError: it is not.
    """
    if not _NAME.fullmatch(value):
        raise ValueError(
            f"--name must be 1 to 40 lower-case letters, digits and dashes, a letter first, got "
            f"{value!r}. Choose another."
        )
    return value


def check_words(**values: str | None) -> None:
    """Rejects values that a shell, a script line or a label would not take unquoted. None passes.

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
    """Rejects what is not NAME=VALUE.

    Raises:
      ValueError: names the variable, and never its value.
    """
    for variable in env:
        if not _VARIABLE.fullmatch(variable):
            raise ValueError(
                "--env must be NAME=VALUE, the name of letters, digits and underscores and no digit "
                f"first, got the name {variable.partition('=')[0]!r}."
            )


def check_flags(name: str, example: str, flags: Sequence[str]) -> None:
    """Raises ValueError for words that another program would not take as flags.

    Args:
      name: our flag that passes them on.
      example: a flag of that program.
      flags: what was given.
    """
    for flag in flags:
        if not flag.startswith("--") or not flag.isprintable():
            raise ValueError(
                f"{name} passes on a flag, as {name}={example}, got {flag!r}. Begin it with two dashes "
                "and remove control characters."
            )


def check_at_least(least: int, **values: int) -> None:
    """Rejects numbers below `least`.

    Raises:
      ValueError: names the option.
    """
    for name, value in values.items():
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}. Raise it.")
