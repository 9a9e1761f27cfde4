"""Targets `tpu_vm` and `queued_resource`: TPU VMs of one slice, through gcloud.

They differ in the request: `tpu_vm` fails if no machines are free, `queued_resource` waits in a queue.
"""

import dataclasses
from collections.abc import Sequence

from launch.plans import (
    Argv,
    TpuPlan,
    check_at_least,
    check_env,
    check_flags,
    check_name,
    check_words,
    glimmer,
    shell,
)

# TPU VM images have Python 3.10, which is too old; uv installs another.
SETUP = (
    "python3 -m pip install --quiet --user uv && "
    "python3 -m uv venv --quiet --clear --python 3.12 .venv && "
    "python3 -m uv pip install --quiet --python .venv -c constraints.txt -e '.[tpu]'"
)
FOLDER = "glimmer"  # in the home folder of every worker
# Without these, ssh and scp hang if a worker vanishes without closing the connection. They follow the
# user's own flags, because the first value counts.
KEEP_ALIVE = ("-oServerAliveInterval=30", "-oServerAliveCountMax=4")


@dataclasses.dataclass(frozen=True)
class Tpu:
    """The machines to request, named as by gcloud."""

    name: str
    zone: str
    accelerator_type: str  # v5p-32
    version: str  # of the TPU software
    project: str | None = None  # None: gcloud's default
    spot: bool = False
    create_flags: tuple[str, ...] = ()  # further flags of gcloud's create
    ssh_flags: tuple[str, ...] = ()  # further flags of gcloud's ssh and scp
    recreate: int = 3  # attempts after preemptions
    setup: str = SETUP  # shell command, run once in the code's folder on every worker
    env: tuple[str, ...] = ()  # NAME=VALUE, for the job's processes

    def __post_init__(self):
        check_name(self.name)
        check_words(
            zone=self.zone,
            accelerator_type=self.accelerator_type,
            version=self.version,
            project=self.project,
        )
        check_at_least(0, recreate=self.recreate)
        check_env(self.env)
        check_flags("--create_flag", "--network=NAME", self.create_flags)
        check_flags("--ssh_flag", "--internal-ip", self.ssh_flags)

    @property
    def place(self) -> Argv:
        """gcloud's flags for project and zone."""
        project = () if self.project is None else (f"--project={self.project}",)
        return (*project, f"--zone={self.zone}", "--quiet")


def tpu_vm(tpu: Tpu, flags: Sequence[str], archive: str) -> TpuPlan:
    """A slice that is created now.

    Args:
      tpu: the slice.
      flags: of glimmer.
      archive: path of the packed code on this machine.
    """
    return _plan(
        tpu,
        flags,
        archive,
        group="tpu-vm",
        create=(f"--version={tpu.version}",),
        state="state",
        ready="READY",
        waiting=("CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING", "UNHIDING"),
        lost=("PREEMPTED",),
    )


def queued_resource(tpu: Tpu, flags: Sequence[str], archive: str) -> TpuPlan:
    """A slice that is waited for in a queue. Arguments as those of `tpu_vm`."""
    return _plan(
        tpu,
        flags,
        archive,
        group="queued-resources",
        create=(f"--node-id={tpu.name}", f"--runtime-version={tpu.version}"),
        state="state.state",
        ready="ACTIVE",
        waiting=("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"),
        lost=("SUSPENDING", "SUSPENDED"),
        # Also deletes the nodes; without it only an empty queue entry can be deleted.
        delete=("--force",),
    )


def _plan(
    tpu: Tpu,
    flags: Sequence[str],
    archive: str,
    *,
    group: str,
    create: Argv,
    state: str,
    ready: str,
    waiting: tuple[str, ...],
    lost: tuple[str, ...],
    delete: Argv = (),
) -> TpuPlan:
    """The plan for gcloud's command group `group`, with its flags and states."""

    def gcloud(verb: str, *rest: str) -> Argv:
        return ("gcloud", "compute", "tpus", group, verb, tpu.name, *tpu.place, *rest)

    kind = (f"--accelerator-type={tpu.accelerator_type}", *create)
    return TpuPlan(
        name=tpu.name,
        create=gcloud("create", *kind, *(("--spot",) if tpu.spot else ()), *tpu.create_flags),
        describe=gcloud("describe", f"--format=value({state})"),
        ready=ready,
        waiting=waiting,
        lost=lost,
        explain=gcloud("describe"),
        ship=_ship(tpu, archive),
        run=_run(tpu, flags),
        delete=gcloud("delete", *delete),
        recreate=tpu.recreate,
    )


def _ship(tpu: Tpu, archive: str) -> tuple[Argv, ...]:
    to = ("gcloud", "compute", "tpus", "tpu-vm", "scp", archive, f"{tpu.name}:{FOLDER}.tar.gz")
    unpack = f"mkdir -p {FOLDER} && tar -xzf {FOLDER}.tar.gz -C {FOLDER} && cd {FOLDER}"
    return (
        (*to, *tpu.place, "--worker=all", *tpu.ssh_flags, *_keep_alive("scp")),
        _ssh(tpu, f"{unpack} && {tpu.setup}"),
    )


def _run(tpu: Tpu, flags: Sequence[str]) -> Argv:
    command = shell(glimmer(".venv/bin/python", flags, tpu.env))
    # gcloud repeats a command when its connection breaks. The lock keeps the second copy from running
    # beside the first, which may still be alive.
    return _ssh(tpu, f"cd {FOLDER} && flock {FOLDER}.lock {command}")


def _ssh(tpu: Tpu, command: str) -> Argv:
    ssh = ("gcloud", "compute", "tpus", "tpu-vm", "ssh", tpu.name, *tpu.place, "--worker=all")
    return (*ssh, *tpu.ssh_flags, *_keep_alive("ssh"), f"--command={command}")


def _keep_alive(program: str) -> Argv:
    return tuple(f"--{program}-flag={flag}" for flag in KEEP_ALIVE)
