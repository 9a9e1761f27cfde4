"""Starts a glimmer job somewhere: python -m launch TARGET [options] -- [glimmer's flags].

    python -m launch local --num_processes=2 -- --run_mode=train --gin_file=...
    python -m launch queued_resource --name=run1 --zone=ZONE --accelerator_type=v5p-32 \\
        --version=v2-alpha-tpuv5 --spot -- --run_mode=train --gin_file=... --gin.MODEL_DIR="'gs://...'"
    python -m launch xm --sweep "TEMPERATURE=[0.5, 1.0]" local -- --run_mode=train --gin_file=...

`--dry_run` prints what would be done. Options may be written with dashes, as gcloud's are.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from glimmer_jax import shipped
from glimmer_jax.main import BAD_INPUT, DONE, parse_flags
from launch import jobset, lifecycle, local, record, slurm, sweep, tpu, xm
from launch.plans import Machines, Plan, Submission, lines
from launch.processes import Interrupts, obey_input, run

ROOT = shipped.root()
# Options that may be repeated -> what the targets call all of them.
_FIELDS = {"create_flag": "create_flags", "ssh_flag": "ssh_flags", "sbatch_flag": "sbatch_flags"}


def parser() -> argparse.ArgumentParser:
    """Targets and their options."""
    formatter = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="python -m launch", description=__doc__, formatter_class=formatter, allow_abbrev=False
    )
    targets = top.add_subparsers(dest="target", required=True, metavar="TARGET")

    def target(name: str, text: str | None) -> argparse.ArgumentParser:
        added = targets.add_parser(name, help=text, allow_abbrev=False)
        added.add_argument("--dry_run", action="store_true", help="print the plan and stop")
        return added

    at_home = target("local", "this machine")
    at_home.add_argument("--num_processes", type=int, default=1)

    for name, text in (
        ("tpu_vm", "a TPU slice that is made now"),
        ("queued_resource", "a TPU slice that is waited for"),
    ):
        cloud = target(name, text)
        cloud.add_argument("--name", required=True)
        cloud.add_argument("--project", help="gcloud's default if left out")
        cloud.add_argument("--zone", required=True)
        cloud.add_argument("--accelerator_type", required=True, metavar="v5p-32")
        cloud.add_argument("--version", required=True, help="of the TPU software: v2-alpha-tpuv5")
        cloud.add_argument("--spot", action="store_true")
        cloud.add_argument("--recreate", type=int, default=3, help="times, after preemption")
        cloud.add_argument("--setup", default=tpu.SETUP, help="shell command for every worker")
        for flag in ("--create_flag", "--ssh_flag"):
            cloud.add_argument(flag, action="append", default=[], help="passed on to gcloud")
        _add_env(cloud)

    gke = target("jobset", "TPU slices of a GKE cluster")
    gke.add_argument("--name", required=True)
    gke.add_argument("--image", required=True, help="has glimmer_jax[tpu] installed")
    gke.add_argument("--tpu", required=True, help=", ".join(jobset.GENERATIONS))
    gke.add_argument("--topology", required=True, metavar="4x4x8", help="chips of a slice")
    gke.add_argument("--slices", type=int, default=1)
    gke.add_argument("--spot", action="store_true")
    gke.add_argument("--namespace", default="default")
    gke.add_argument("--service_account", help="of Kubernetes")
    gke.add_argument("--max_restarts", type=int, default=3, help="after crashes")
    _add_env(gke)

    mesh = target("slurm", "GPUs of a Slurm cluster")
    mesh.add_argument("--name", required=True)
    mesh.add_argument("--nodes", type=int, default=1)
    mesh.add_argument("--gpus_per_node", type=int, default=8)
    mesh.add_argument("--time", help="limit of one start: 12:00:00")
    mesh.add_argument("--partition")
    mesh.add_argument("--account")
    mesh.add_argument("--sbatch_flag", action="append", default=[], help="passed on to sbatch")

    experiment = target("xm", "an XManager experiment: a sweep over one of the others")
    experiment.add_argument("--sweep", action="append", default=[], metavar="NAME=[V, V]")
    experiment.add_argument("--parallel", type=int, default=1, help="units at a time")
    experiment.add_argument("command", nargs=argparse.REMAINDER, metavar="TARGET [options]")
    return top


def _add_env(target: argparse.ArgumentParser) -> None:
    target.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="of the job's processes"
    )


def make_plan(
    args: argparse.Namespace, flags: Sequence[str], code: record.Code
) -> Plan | sweep.Sweep:
    """The plan of a parsed command.

    Args:
      args: from `parser`.
      flags: of glimmer.
      code: what is launched.

    Raises:
      ValueError: values that do not fit.
    """
    options: dict[str, Any] = {
        _FIELDS.get(k, k): tuple(v) if isinstance(v, list) else v
        for k, v in vars(args).items()
        if k not in ("target", "dry_run")
    }
    parsed = parse_flags(flags)
    if args.target not in ("local", "xm") or options.get("num_processes", 1) > 1:
        # A slice of one host is one process, and `memory` may want its chips: to append, to repair.
        one_host = args.target in ("tpu_vm", "queued_resource")
        record.require_job(parsed, ("memory",) if one_host else ())
    match args.target:
        case "local":
            return local.plan(flags, args.num_processes, local.free_port(), sys.executable)
        case "tpu_vm" | "queued_resource":
            record.require_bucket(parsed)
            make = tpu.tpu_vm if args.target == "tpu_vm" else tpu.queued_resource
            return make(tpu.Tpu(**options), flags, record.archive_path(code))
        case "jobset":
            record.require_bucket(parsed)
            machines = jobset.JobSet(**options)
            jobset.check_slices(machines, parsed)
            return jobset.plan(machines, flags, code.annotations())
        case "slurm":
            what = " ".join(code.annotations().values()) or "not in a checkout"
            return slurm.plan(slurm.Slurm(**options), flags, os.getcwd(), sys.executable, what)
        case _:
            axes = [sweep.parse_axis(text) for text in args.sweep]
            # Mistakes in the units' target are found here, not once in every unit.
            unit = parser().parse_args(args.command)
            make_plan(unit, flags, code)
            unit_name = getattr(unit, "name", None)
            return sweep.plan(axes, args.command, unit_name, flags, args.parallel)


def execute(plan: Plan | sweep.Sweep, code: record.Code) -> int:
    """Does what the plan says; returns the exit code."""
    if isinstance(plan, sweep.Sweep):
        return xm.run(plan, "glimmer")
    with Interrupts() as interrupts:
        if isinstance(plan, Submission):
            status = run([plan.submit], interrupts, stdin=plan.stdin)
            if status == DONE:
                print(f"launch: submitted; then:\n{lines(*plan.follow)}", end="")
            return status
        if isinstance(plan, Machines):
            record.pack(ROOT, code, record.archive_path(code))
            return lifecycle.play(plan, interrupts)
        return run(plan.processes, interrupts)


def main(argv: Sequence[str]) -> int:
    """Launches; returns the exit code: the job's own where it is waited for."""
    own, flags = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, flags = own[:at], own[at + 1 :]
    args = parser().parse_args([_underscores(part) for part in own])
    if not flags:
        parser().error("what to launch is missing: after the options write -- and glimmer's flags")
    parse_flags(flags)  # a mistake in them ends here, not on a machine that costs money
    code = record.code(ROOT)
    try:
        plan = make_plan(args, flags, code)
        if args.dry_run:
            print(plan.text(), end="")
            return DONE
        path = record.write(code, argv, flags, plan.text())
        print(f"launch: recorded in {path}", flush=True)
        return execute(plan, code)
    except (ValueError, FileNotFoundError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return BAD_INPUT


def _underscores(part: str) -> str:
    """`--accelerator-type=v5p-8` -> `--accelerator_type=v5p-8`."""
    if not part.startswith("--"):
        return part
    name, equals, value = part.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


if __name__ == "__main__":
    obey_input()
    sys.exit(main(sys.argv[1:]))
