"""Launches a glimmer job: python -m launch TARGET [options] -- [glimmer's flags].

    python -m launch local --num_processes=2 -- --run_mode=train --gin_file=...
    python -m launch queued_resource --name=run1 --zone=ZONE --accelerator_type=v5p-32 \\
        --version=v2-alpha-tpuv5 --spot -- --run_mode=train --gin_file=... --gin.MODEL_DIR="'gs://...'"
    python -m launch xm --sweep "TEMPERATURE=[0.5, 1.0]" local -- --run_mode=train --gin_file=...

`--dry_run` prints the plan and stops. Options may be written with dashes, as for gcloud.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from glimmer_jax import shipped
from glimmer_jax.main import parse_flags
from glimmer_jax.runtime.exit_codes import DONE, INVALID_INPUT
from launch import jobset, lifecycle, local, record, slurm, sweep, tpu, xm
from launch.plans import Plan, SubmitPlan, TpuPlan, lines
from launch.processes import Interrupts, obey_input, run

ROOT = shipped.root()
# Repeatable option -> the field of the targets that holds all of its values.
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

    local_target = target("local", "this machine")
    local_target.add_argument("--num_processes", type=int, default=1)

    for name, text in (
        ("tpu_vm", "a TPU slice, created now"),
        ("queued_resource", "a TPU slice, waited for in a queue"),
    ):
        cloud = target(name, text)
        cloud.add_argument("--name", required=True)
        cloud.add_argument("--project", help="gcloud's default if left out")
        cloud.add_argument("--zone", required=True)
        cloud.add_argument("--accelerator_type", required=True, metavar="v5p-32")
        cloud.add_argument("--version", required=True, help="of the TPU software: v2-alpha-tpuv5")
        cloud.add_argument("--spot", action="store_true")
        cloud.add_argument(
            "--recreate", type=int, default=3, help="times that a preempted slice is created again"
        )
        cloud.add_argument("--setup", default=tpu.SETUP, help="shell command run on every worker")
        for flag in ("--create_flag", "--ssh_flag"):
            cloud.add_argument(flag, action="append", default=[], help="passed on to gcloud")
        _add_env(cloud)

    gke = target("jobset", "TPU slices of a GKE cluster")
    gke.add_argument("--name", required=True)
    gke.add_argument("--image", required=True, help="with glimmer_jax[tpu] installed")
    gke.add_argument("--tpu", required=True, help=", ".join(jobset.GENERATIONS))
    gke.add_argument("--topology", required=True, metavar="4x4x8", help="chips of a slice")
    gke.add_argument("--slices", type=int, default=1)
    gke.add_argument("--spot", action="store_true")
    gke.add_argument("--namespace", default="default")
    gke.add_argument("--service_account", help="of Kubernetes")
    gke.add_argument("--max_restarts", type=int, default=3, help="after crashes")
    _add_env(gke)

    cluster = target("slurm", "GPUs of a Slurm cluster")
    cluster.add_argument("--name", required=True)
    cluster.add_argument("--nodes", type=int, default=1)
    cluster.add_argument("--gpus_per_node", type=int, default=8)
    cluster.add_argument("--time", help="limit of one attempt: 12:00:00")
    cluster.add_argument("--partition")
    cluster.add_argument("--account")
    cluster.add_argument("--sbatch_flag", action="append", default=[], help="passed on to sbatch")

    experiment = target("xm", "an XManager experiment: a sweep over another target")
    experiment.add_argument("--sweep", action="append", default=[], metavar="NAME=[V, V]")
    experiment.add_argument("--parallel", type=int, default=1, help="units at a time")
    experiment.add_argument("command", nargs=argparse.REMAINDER, metavar="TARGET [options]")
    return top


def _add_env(target: argparse.ArgumentParser) -> None:
    target.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="for the job's processes"
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
      ValueError: invalid or incompatible values.
    """
    options: dict[str, Any] = {
        _FIELDS.get(k, k): tuple(v) if isinstance(v, list) else v
        for k, v in vars(args).items()
        if k not in ("target", "dry_run")
    }
    parsed = parse_flags(flags)
    if args.target not in ("local", "xm") or options.get("num_processes", 1) > 1:
        # A slice of one host is one process, and `memory` uses its chips to append and repair.
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
            # Errors in the units' target are reported here, not by every unit.
            unit = parser().parse_args(args.command)
            make_plan(unit, flags, code)
            unit_name = getattr(unit, "name", None)
            return sweep.plan(axes, args.command, unit_name, flags, args.parallel)


def execute(plan: Plan | sweep.Sweep, code: record.Code) -> int:
    """Executes the plan; returns the exit code."""
    if isinstance(plan, sweep.Sweep):
        return xm.run(plan, "glimmer")
    with Interrupts() as interrupts:
        if isinstance(plan, SubmitPlan):
            status = run([plan.submit], interrupts, stdin=plan.stdin)
            if status == DONE:
                print(f"launch: submitted. Next commands:\n{lines(*plan.follow)}", end="")
            return status
        if isinstance(plan, TpuPlan):
            record.pack(ROOT, code, record.archive_path(code))
            return lifecycle.run_plan(plan, interrupts)
        return run(plan.processes, interrupts)


def main(argv: Sequence[str]) -> int:
    """Launches; returns the exit code, which is the job's own for targets that wait for it."""
    own, flags = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, flags = own[:at], own[at + 1 :]
    args = _parse(own)
    if not flags:
        parser().error("glimmer's flags are missing: write them after the options and --")
    parse_flags(flags)  # An error in them ends the launch before any machine costs money.
    try:
        code = record.code(ROOT)
        plan = make_plan(args, flags, code)
        # What is shown and recorded holds the names of variables, not their values.
        shown = record.without_secrets(own)
        text = plan.text() if shown == own else make_plan(_parse(shown), flags, code).text()
        if args.dry_run:
            print(text, end="")
            return DONE
        path = record.write(code, [*shown, "--", *flags], flags, text)
        print(f"launch: recorded in {path}", flush=True)
        return execute(plan, code)
    except (ValueError, OSError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return INVALID_INPUT


def _parse(own: Sequence[str]) -> argparse.Namespace:
    return parser().parse_args([_underscores(part) for part in own])


def _underscores(part: str) -> str:
    """`--accelerator-type=v5p-8` -> `--accelerator_type=v5p-8`."""
    if not part.startswith("--"):
        return part
    name, equals, value = part.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


if __name__ == "__main__":
    obey_input()
    sys.exit(main(sys.argv[1:]))
