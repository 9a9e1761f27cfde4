"""Every target's plan, word for word as `--dry_run` prints it, for one code and one command.

After an intended change, check the printed difference and rewrite the goldens:

    GLIMMER_REWRITE_GOLDENS=1 python -m pytest tests/launch/goldens_test.py
"""

import inspect
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

import launch.__main__ as command_line
from glimmer_jax import main
from glimmer_jax.runtime import distributed
from launch import jobset, local, processes, record, slurm
from tests.children import running

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CODE = record.Code("c0ffee" * 6 + "c0de", "7ree" * 10, b"diff")
# Quotes, blanks, a dollar and a semicolon: what must survive every shell on the way.
FLAGS = [
    "--run_mode=train",
    "--gin_file=gin/runs/finetune.gin",
    "--gin.MODEL_DIR='gs://bucket/my run'",
    "--gin.MIXTURE_OR_TASK_NAME='a;$(b)'",
]
TPU = "--name=run1 --zone=us-east5-a --accelerator_type=v5p-32 --version=v2-alpha-tpuv5"
OPTIONS = {
    "local": "local --num_processes=2",
    "tpu_vm": f"tpu_vm {TPU} --project=mine --spot --recreate=1 --create_flag=--network=inner "
    "--ssh_flag=--tunnel-through-iap --setup='make env' "
    "--env=GLIMMER_CACHE='/mnt/a b'",
    "queued_resource": f"queued_resource {TPU} --spot",
    "jobset": "jobset --name=run1 --image=repo/glimmer:1 --tpu=v5p --topology=2x2x4",
    "jobset_multislice": "jobset --name=run1 --image=repo/glimmer@sha256:ab --tpu=v6e "
    "--topology=4x4 --slices=2 --spot --namespace=team --service_account=writer --max_restarts=5 "
    "--env='GLIMMER_CACHE=/mnt/$(x)' --env=EMPTY=",
    "slurm": "slurm --name=run1 --nodes=2 --time=12:00:00 --partition=a100 --account=qa "
    "--sbatch_flag=--qos=high --sbatch_flag=--mem=0",
    "xm": f'xm --sweep="TEMPERATURE=[0.5, 1.0]" --sweep="BEST_METRIC=[\'mean\', None]" --parallel=2 '
    f"queued_resource {TPU}",
}


def plan(options, monkeypatch, flags=FLAGS):
    monkeypatch.setattr(local, "free_port", lambda: 8476)
    monkeypatch.setattr(os, "getcwd", lambda: "/home/me/my checkout")
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    monkeypatch.setattr("os.getuid", lambda: 1000)
    args = command_line.parser().parse_args(shlex.split(options))
    if getattr(args, "slices", 1) > 1:
        flags = [*flags, f"--gin.MESH_SLICE={args.slices}"]
    return command_line.make_plan(args, flags, CODE)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_plan_is_the_golden(name, monkeypatch):
    text = plan(OPTIONS[name], monkeypatch).text()
    path = GOLDENS / f"{name}.txt"
    if os.environ.get("GLIMMER_REWRITE_GOLDENS") == "1":
        path.write_text(text)
    stored = path.read_text() if path.exists() else ""
    assert text == stored, f"{path.name} should be:\n{text}"


@pytest.mark.parametrize("name", ["tpu_vm", "slurm"])
def test_flags_come_through_the_shell_unchanged(name, monkeypatch):
    made = plan(OPTIONS[name], monkeypatch)
    if name == "slurm":
        text = next(line for line in made.stdin.splitlines() if line.startswith("srun"))
    else:
        text = made.run[-1].removeprefix("--command=")
    stub = 'cd() { :; }; show() { printf "%s\\n" "$@"; }; srun() { show "$@"; }; flock() { show "$@"; }'
    done = subprocess.run(
        ["bash", "-c", f"{stub}\n{text}"], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-len(FLAGS) :] == FLAGS


def test_kubernetes_puts_no_variables_into_the_flags(monkeypatch):
    spec = jobset.job_spec(
        jobset.JobSet("run1", "image", "v5e", "2x4"), ["--gin.X='$(HOME) $HOME'"]
    )
    assert spec["template"]["spec"]["containers"][0]["command"][-1] == "--gin.X='$$(HOME) $HOME'"


@pytest.mark.parametrize(
    ("tpu", "topology", "hosts", "chips"),
    [
        ("v5e", "1x1", 1, 1),
        ("v6e", "2x4", 1, 8),
        ("v6e", "4x4", 4, 4),
        ("v4", "2x2x1", 1, 4),
        ("v5p", "4x4x8", 32, 4),
        ("tpu7x", "2x2x2", 2, 4),
    ],
)
def test_every_host_of_a_slice_has_a_pod_with_its_chips(tpu, topology, hosts, chips):
    spec = jobset.job_spec(jobset.JobSet("run1", "image", tpu, topology), FLAGS)
    assert spec["completions"] == spec["parallelism"] == hosts
    [container] = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}


@pytest.mark.parametrize("spot", [False, True])
def test_the_job_is_one_that_kubernetes_takes(spot, monkeypatch):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    spec = jobset.job_spec(
        jobset.JobSet("run1", "image", "v5p", "2x2x4", spot=spot, service_account="s"), FLAGS
    )
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": spec}
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


BAD = [
    ("tpu_vm --name=Run --zone=z --accelerator_type=a --version=v", "--name must be 1 to 40"),
    ("tpu_vm --name=r --zone=z;rm --accelerator_type=a --version=v", "--zone must be letters"),
    ("tpu_vm --name=r --zone=-z --accelerator_type=a --version=v", "--zone must be letters"),
    (f"tpu_vm {TPU} --recreate=-1", "--recreate must be at least 0, got -1"),
    (f"tpu_vm {TPU} --create_flag=network", "--create_flag passes on a flag.*network"),
    ("jobset --name=r --image=i --tpu=v9 --topology=1x1", "--tpu must be one of v4, v5e"),
    ("jobset --name=r --image=i --tpu=v5p --topology=4x4", "--topology of v5p must be 3 numbers"),
    ("jobset --name=r --image=i --tpu=v5e --topology=3x5", "has 15 chips"),
    ("jobset --name=r --image='i x' --tpu=v5e --topology=2x2", "--image must be letters"),
    ("slurm --name=r --nodes=0", "--nodes must be at least 1, got 0"),
    ("slurm --name=r --partition='a\n#SBATCH --uid=0'", "--partition must be letters"),
    ("slurm --name=r --sbatch_flag=qos", "--sbatch_flag passes on a flag"),
    ("slurm --name=r --sbatch_flag='--qos=a\nrm'", "--sbatch_flag passes on a flag"),
    (f"tpu_vm {TPU} --env=1A=x", "--env must be NAME=VALUE.*'1A'"),
    (f"queued_resource {TPU} --env=A-B=x", "--env must be NAME=VALUE"),
    ("jobset --name=r --image=i --tpu=v5e --topology=2x2 --env=A", "--env must be NAME=VALUE"),
    ("local --num_processes=0", "--num_processes must be at least 1"),
    ("xm --sweep=X local", r"--sweep must be NAME=\[VALUE, VALUE\]"),
    ("xm --sweep=X=[1] --sweep=X=[2] local", "must name each axis once, got X, X"),
    ("xm --sweep=MODEL_DIR=[1] local", "A sweep needs --gin.MODEL_DIR"),
    ("xm --parallel=0 local", "--parallel must be at least 1"),
    ("xm --sweep=X=[1] slurm --name=r --nodes=0", "--nodes must be at least 1"),
    (f"xm --sweep=X=[1] slurm --name={'r' * 40}", f"--name must be 1 to 40 .* got '{'r' * 40}-1'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_invalid_values_are_rejected(options, message, monkeypatch):
    with pytest.raises(ValueError, match=message):
        plan(options, monkeypatch)


def test_local_output_on_a_deleted_machine_is_rejected(monkeypatch):
    flags = ["--run_mode=eval", "--gin.EVAL_OUTPUT_DIR='runs/x'"]
    for name in ("tpu_vm", "queued_resource", "jobset"):
        with pytest.raises(ValueError, match="EVAL_OUTPUT_DIR='runs/x' would be deleted"):
            plan(OPTIONS[name], monkeypatch, flags)


@pytest.mark.parametrize("bindings", [[], ["--gin.MODEL_DIR=%HERE"]])
def test_output_set_only_in_a_gin_file_is_rejected(monkeypatch, bindings):
    flags = ["--run_mode=train", "--gin_file=mine.gin", *bindings]
    for name in ("tpu_vm", "queued_resource", "jobset"):
        with pytest.raises(ValueError, match=r"Add --gin\.MODEL_DIR=\"'gs://BUCKET/RUN'\""):
            plan(OPTIONS[name], monkeypatch, flags)
    plan(OPTIONS["local"], monkeypatch, flags)


def test_modes_without_output_need_no_bucket(monkeypatch):
    for name in ("tpu_vm", "queued_resource", "jobset"):
        plan(OPTIONS[name], monkeypatch, ["--run_mode=eval", "--gin.EVAL_OUTPUT_DIR=None"])


@pytest.mark.parametrize("mode", ["export", "passages", "score", "memory", main.PREFLIGHT])
def test_the_work_of_one_process_is_not_started_in_many(mode, monkeypatch):
    flags = [f"--run_mode={mode}", "--gin.OUTPUT_PATH='gs://b/a'"]
    for name in ("local", "tpu_vm", "queued_resource", "jobset", "slurm"):
        if mode == "memory" and name in ("tpu_vm", "queued_resource"):
            continue  # a slice of one host is one process
        with pytest.raises(ValueError, match=f"run_mode={mode} .*one process"):
            plan(OPTIONS[name], monkeypatch, flags)
    plan("local", monkeypatch, flags)


@pytest.mark.parametrize(
    ("slices", "bindings", "wanted"),
    [(2, [], 2), (2, ["--gin.MESH_SLICE=1"], 2), (1, ["--gin.MESH_SLICE=2"], 1)],
)
def test_a_mesh_with_another_number_of_slices_is_rejected(monkeypatch, slices, bindings, wanted):
    options = f"{OPTIONS['jobset']} --slices={slices}"
    args = command_line.parser().parse_args(options.split())
    message = rf"--slices={slices} needs .* Add --gin\.MESH_SLICE={wanted}\."
    with pytest.raises(ValueError, match=message):
        command_line.make_plan(args, [*FLAGS, *bindings], CODE)
    command_line.make_plan(args, [*FLAGS, *bindings, f"--gin.MESH_SLICE={slices}"], CODE)
    # Each host has a mesh of its own, or none.
    for mode, macro in (("build_memory", "MEMORY_DIR"), ("retrieve", "DATA_DIR")):
        command_line.make_plan(args, [f"--run_mode={mode}", f"--gin.{macro}='gs://b/a'"], CODE)


KUBECTL = """#!/bin/sh
cat > /dev/null
case "$*" in *" create --filename=-") ;; *) exit 0 ;; esac
[ ! -e taken ] || { echo 'Error from server (AlreadyExists): "run1" already exists' >&2; exit 1; }
touch taken
"""


def test_a_jobset_whose_name_is_taken_is_not_submitted(tmp_path, monkeypatch, capfd):
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    flags = ["--run_mode=eval", "--gin.EVAL_OUTPUT_DIR=None"]
    argv = [*shlex.split(OPTIONS["jobset"]), "--", *flags]
    assert command_line.main(argv) == 0
    assert "launch: submitted" in capfd.readouterr().out
    assert command_line.main(argv) == 1
    said = capfd.readouterr()
    assert "AlreadyExists" in said.err and "submitted" not in said.out


def test_an_installed_package_cannot_be_shipped():
    with pytest.raises(ValueError, match="needs a git checkout"):
        record.archive_path(record.Code(None, None, b""))


# Ends as $CODE says. After it, srun's: one process for each of $CODES, and the highest code of all.
PROCESS = """#!/bin/sh
[ "$CODE" -lt 128 ] || kill -$((CODE - 128)) $$
exit "$CODE"
"""
SRUN = """
export CODE
srun() {
  shift
  highest=0
  for CODE in $CODES; do
    "$@"
    code=$?
    [ "$code" -le "$highest" ] || highest=$code
  done
  return "$highest"
}
scontrol() { echo "$@"; }
"""


def slurm_life(folder, codes, seconds=0):
    """How a script ends whose processes end with `codes` after so long, and what it prints."""
    python = folder / "python"
    python.write_text(PROCESS)
    python.chmod(0o755)
    text = slurm.script(slurm.Slurm("run1"), FLAGS, str(folder), str(python), "code")
    environment = {
        **os.environ,
        "CODES": str(codes),
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": "500",
    }
    done = subprocess.run(
        ["bash", "-c", f"{SRUN}SECONDS={seconds}\n{text}"],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [
        ("0 0", 0, False),
        ("1", 1, False),
        ("42 1 42", 1, False),
        ("42 2 42", 2, False),
        ("137 1 2 42", 2, False),
        ("42 42", 42, True),
        ("0 42", 42, True),
        ("42 137 1", 137, True),
    ],
)
def test_slurm_requeues_preempted_and_killed_jobs(tmp_path, codes, code, requeued):
    assert slurm_life(tmp_path, codes) == (code, "requeue 7\n" if requeued else "")


@pytest.mark.parametrize(("code", "seconds"), [(42, 0), (137, 0), (137, 10 * slurm.SHORT)])
def test_slurm_gives_up_after_consecutive_short_attempts(tmp_path, monkeypatch, code, seconds):
    monkeypatch.setattr(slurm, "RESTARTS", 2)
    again = "requeue 7\n"
    for _ in range(2):
        assert slurm_life(tmp_path, code, seconds) == (code, again)
    # One that came further.
    assert slurm_life(tmp_path, 42, slurm.SHORT) == (42, again)
    for _ in range(2):
        assert slurm_life(tmp_path, code, seconds) == (code, again)
    last, said = slurm_life(tmp_path, code, seconds)
    assert last == code and "3 consecutive short attempts, not requeued" in said
    assert again not in said
    assert slurm_life(tmp_path, 0) == (0, "")
    assert not (tmp_path / "run1-7.short").exists()


def test_a_process_under_slurm_has_its_time_to_save(tmp_path):
    saves = f"trap 'sleep 0.3; exit 42' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done"
    wrapped = ["bash", "-c", slurm.CODES, "glimmer", "sh", "-c", saves]
    with running(wrapped, start_new_session=True) as process:
        while not (tmp_path / "up").exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(30) == 42


def test_other_processes_run_until_jax_detects_the_dead_one():
    silence = inspect.signature(distributed.join).parameters["silence"].default
    assert silence + 50 < processes.GRACE
    text = slurm.script(slurm.Slurm("run1"), FLAGS, "/", "python", "code")
    assert f"srun --wait={processes.GRACE:.0f} " in text


def test_a_worker_that_vanishes_does_not_hold_ssh_for_ever(monkeypatch):
    made = plan(OPTIONS["tpu_vm"], monkeypatch)
    for argv in (*made.ship, made.run):
        program = argv[4]
        for option in ("ServerAliveInterval=30", "ServerAliveCountMax=4"):
            assert f"--{program}-flag=-o{option}" in argv
