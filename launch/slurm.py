"""Target `slurm`: a batch script for a mesh of GPUs, one process a GPU, as JAX expects of Slurm.

The script runs in the folder it was sent from, which all nodes must see.
"""

import dataclasses
import shlex
from collections.abc import Sequence

from launch.plans import Submission, check_at_least, check_name, check_words, glimmer, shell
from launch.processes import GRACE

FINAL_SAVE = 120  # seconds between SIGTERM and the time limit
# In a row, of lives that were killed or short; then the job is not started again. A longer one that
# ends with 42 has come further, and does not count.
RESTARTS = 10
SHORT = 600  # seconds
# Runs a process. srun gives the highest code of all: so bad input (2) goes above everything, and a
# crash (1) above the 42 of those that it took along. SIGTERM reaches this shell too, which waits
# all the same.
CODES = """trap : TERM; "$@"; code=$?; case $code in 1) exit 100;; 2) exit 255;; esac; exit $code"""


@dataclasses.dataclass(frozen=True)
class Slurm:
    """What to ask Slurm for; the words are sbatch's."""

    name: str
    nodes: int = 1
    gpus_per_node: int = 8
    time: str | None = None  # limit of one start: 12:00:00; the job goes on in the next one
    partition: str | None = None
    account: str | None = None
    sbatch_flags: tuple[str, ...] = ()  # further flags of sbatch

    def __post_init__(self):
        check_name(self.name)
        check_words(time=self.time, partition=self.partition, account=self.account)
        check_at_least(1, nodes=self.nodes, gpus_per_node=self.gpus_per_node)
        for flag in self.sbatch_flags:
            if not flag.startswith("--") or "\n" in flag:
                raise ValueError(
                    "--sbatch_flag must be a flag of sbatch such as --sbatch_flag=--qos=NAME, got "
                    f"{flag!r}. Begin it with two dashes, and write one line."
                )


def plan(slurm: Slurm, flags: Sequence[str], folder: str, python: str, code: str) -> Submission:
    """Sends the script.

    Args:
      slurm: the machines.
      flags: of glimmer.
      folder: working directory, seen by all nodes.
      python: the interpreter, seen by all nodes.
      code: what the code is, for a comment; one line.
    """
    return Submission(
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
# The others follow a process that ended, or are ended after so many seconds.
srun --wait={GRACE:.0f} {shell(process)}
code=$?
case $code in 100) code=1 ;; 255) code=2 ;; esac
# 42: stopped at the time limit or for another job, and saved. 128 and more: a process was killed,
# for its memory or with its node, and may be once more. Each cut-short life is a line of a file.
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
    echo "launch: cut short {RESTARTS + 1} times in a row, not started again: $short"
  fi
fi
exit "$code"
"""
