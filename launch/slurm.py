"""Target `slurm`: a batch script for GPUs, with one process per GPU, as JAX expects under Slurm.

The script runs in the folder of the launch, which all nodes must share.
"""

import dataclasses
import shlex
from collections.abc import Sequence

from launch.plans import (
    FINAL_SAVE,
    SubmitPlan,
    check_at_least,
    check_flags,
    check_name,
    check_words,
    glimmer,
    shell,
)
from launch.processes import GRACE

# Consecutive attempts that were killed or short, after which the job is not requeued. A longer attempt
# that ends with 42 has made progress and does not count.
RESTARTS = 10
SHORT = 600  # seconds
# Runs a process. srun returns the highest exit code, so invalid input (2) is mapped above all others, and
# a crash (1) above the 42 of the processes that it ended. SIGTERM also reaches this shell, which waits
# for the process.
CODES = """trap : TERM; "$@"; code=$?; case $code in 1) exit 100;; 2) exit 255;; esac; exit $code"""


@dataclasses.dataclass(frozen=True)
class Slurm:
    """The resources to request from Slurm, named as by sbatch."""

    name: str
    nodes: int = 1
    gpus_per_node: int = 8
    time: str | None = None  # limit of one attempt: 12:00:00; the next one resumes
    partition: str | None = None
    account: str | None = None
    sbatch_flags: tuple[str, ...] = ()  # further flags of sbatch

    def __post_init__(self):
        check_name(self.name)
        check_words(time=self.time, partition=self.partition, account=self.account)
        check_at_least(1, nodes=self.nodes, gpus_per_node=self.gpus_per_node)
        check_flags("--sbatch_flag", "--qos=NAME", self.sbatch_flags)


def plan(slurm: Slurm, flags: Sequence[str], folder: str, python: str, code: str) -> SubmitPlan:
    """Submits the script.

    Args:
      slurm: the machines.
      flags: of glimmer.
      folder: working directory, shared by all nodes.
      python: the interpreter, on all nodes.
      code: identifies the code in a comment; one line.
    """
    return SubmitPlan(
        submit=("sbatch",),
        stdin=script(slurm, flags, folder, python, code),
        follow=(("squeue", f"--name={slurm.name}"), ("scancel", f"--name={slurm.name}")),
    )


def script(slurm: Slurm, flags: Sequence[str], folder: str, python: str, code: str) -> str:
    """The batch script; arguments as those of `plan`."""
    options = {
        "job-name": slurm.name,
        "partition": slurm.partition,
        "account": slurm.account,
        "nodes": slurm.nodes,
        "ntasks-per-node": slurm.gpus_per_node,
        "gpus-per-node": slurm.gpus_per_node,
        "time": slurm.time,
        "signal": f"TERM@{FINAL_SAVE}",
        "output": f"{slurm.name}-%j.log",
        "open-mode": "append",
    }
    head = "".join(f"#SBATCH --{k}={v}\n" for k, v in options.items() if v is not None)
    more = "".join(f"#SBATCH {flag}\n" for flag in slurm.sbatch_flags)
    process = ("bash", "-c", CODES, "glimmer", *glimmer(python, flags))
    return f"""#!/bin/bash
{head}#SBATCH --requeue
{more}# Code: {code}
cd {shlex.quote(folder)} || exit 2
# After one process ends, the others are ended within so many seconds.
srun --wait={GRACE:.0f} {shell(process)}
code=$?
case $code in 100) code=1 ;; 255) code=2 ;; esac
# 42: preempted or at the time limit, and saved. 128 and above: a process was killed, because of its
# memory or with its node. Each short attempt is a line of a file.
short="{slurm.name}-$SLURM_JOB_ID.short"
if [ "$code" -ge 128 ] || {{ [ "$code" -eq 42 ] && [ "$SECONDS" -lt {SHORT} ]; }}; then
  echo "$code" >> "$short"
else
  rm -f "$short"
fi
if [ "$code" -eq 42 ] || [ "$code" -ge 128 ]; then
  if [ ! -e "$short" ] || [ "$(wc -l < "$short")" -le {RESTARTS} ]; then
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "launch: {RESTARTS + 1} consecutive short attempts, not requeued: $short"
  fi
fi
exit "$code"
"""
