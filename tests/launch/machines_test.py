"""The lifecycle of TPU machines with the real runner: create, preempt, recreate, delete. No cloud."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

import launch.__main__ as command_line
from glimmer_jax.storage.errors import StorageError
from launch import local, plans, record, tpu
from tests.children import running

HERE = pathlib.Path(__file__).parent
OPTIONS = ["--name=run1", "--zone=z", "--accelerator_type=v5p-8", "--version=v2-alpha-tpuv5"]
FLAGS = ["--run_mode=eval", "--gin.EVAL_OUTPUT_DIR=None", "--gin.QUESTIONS='it''s $HOME; \"a b\"'"]
SETUP = "mkdir -p .venv/bin && cp fake_python .venv/bin/python"
PREEMPTED = (
    '[ "$verb" = run ] && touch "taken$life" && exit 255\n[ -e "taken$life" ] && state=PREEMPTED'
)


def go(target="tpu_vm", *options):
    return command_line.main(
        [target, *OPTIONS, f"--setup={SETUP}", "--recreate=2", *options, "--", *FLAGS]
    )


def life(gcloud, number, text):
    path = gcloud / "lives" / str(number)
    path.write_text(path.read_text() + text + "\n")


def verbs(gcloud):
    lines = (gcloud / "log").read_text().splitlines()
    kinds = [
        "run" if "flock" in line else "setup" if "--command=" in line else line.split()[3]
        for line in lines
    ]
    return [kind for kind in kinds if kind != "describe"]


def looks(gcloud):
    """Number of state queries."""
    return sum(line.split()[3] == "describe" for line in (gcloud / "log").read_text().splitlines())


ONE_LIFE = ["create", "scp", "setup", "run", "delete"]


@pytest.mark.parametrize("target", ["tpu_vm", "queued_resource"])
def test_code_and_flags_arrive_and_everything_is_deleted(gcloud, tmp_path, target):
    assert go(target) == 0
    assert verbs(gcloud) == ONE_LIFE
    seen = (gcloud / "seen").read_text().splitlines()
    assert seen == ["-m", "glimmer_jax.main", "--distributed", *FLAGS]
    assert (gcloud / "worker" / "glimmer" / "new.py").read_text() == "not committed\n"
    written = json.loads((tmp_path / "launch.json").read_text())
    code = record.code(command_line.ROOT)
    assert written["commit"] == code.commit and written["diff_sha256"] == code.diff_sha256
    assert written["argv"][0] == target and written["argv"][-len(FLAGS) :] == FLAGS


def test_the_job_waits_until_the_machines_are_ready(gcloud):
    life(gcloud, 1, 'n=$(cat n 2>/dev/null || echo 0); [ "$verb" = describe ] && echo $((n+1)) > n')
    life(gcloud, 1, "[ $n -lt 3 ] && state=PROVISIONING")
    assert go("queued_resource") == 0
    assert int((gcloud / "n").read_text()) == 4


def test_preempted_machines_are_recreated(gcloud):
    life(gcloud, 1, PREEMPTED)
    assert go() == 0
    assert verbs(gcloud) == ONE_LIFE * 2


def test_a_job_that_saved_and_stopped_is_started_on_new_plan(gcloud, monkeypatch):
    monkeypatch.setenv("JOB", 'exit $([ "$(cat "$GCLOUD_STUB/life")" = 1 ] && echo 42 || echo 0)')
    assert go() == 0
    assert verbs(gcloud) == ONE_LIFE * 2


def test_machines_lost_while_waiting_or_shipping_are_recreated(gcloud):
    life(gcloud, 1, "state=SUSPENDED")
    life(  # FAILED after it was ready
        gcloud,
        2,
        '[ "$verb" = scp ] && exit 1; state=$([ -e "asked" ] && echo FAILED || echo ACTIVE)',
    )
    life(gcloud, 2, '[ "$verb" = describe ] && touch asked')
    assert go("queued_resource") == 0
    assert verbs(gcloud) == ["create", "delete", "create", *["scp"] * 3, "delete", *ONE_LIFE]


@pytest.mark.parametrize("target", ["tpu_vm", "queued_resource"])
def test_machines_that_fail_before_they_are_ready_end_the_launch(gcloud, capfd, target):
    life(gcloud, 1, 'case "$*" in *--format*) state=FAILED ;; *) state="no quota" ;; esac')
    assert go(target) == 2
    assert verbs(gcloud) == ["create", "delete"]
    said = capfd.readouterr().out
    assert "no quota\nlaunch: run1 is FAILED before it was ever ready: check quota" in said


def test_the_variables_of_the_job_are_its_environment(gcloud, monkeypatch):
    monkeypatch.setenv("JOB", 'printf "%s|" "$GLIMMER_CACHE" "$B" > "$GCLOUD_STUB/cache"')
    assert go("tpu_vm", "--env=GLIMMER_CACHE=/mnt/a 'b' $HOME", "--env=B=") == 0
    assert (gcloud / "cache").read_text() == "/mnt/a 'b' $HOME||"
    assert (gcloud / "seen").read_text().splitlines()[-len(FLAGS) :] == FLAGS


def test_an_unwritable_record_ends_the_launch_before_anything_is_made(gcloud, monkeypatch, capfd):
    error = StorageError("gone")

    def refuse(*_):
        raise error

    monkeypatch.setattr(record, "record_path", lambda flags: "gs://b/launch.json")
    monkeypatch.setattr(record, "_write", refuse)
    assert go() == 2
    said = capfd.readouterr().err
    assert f"launch.json could not be written to gs://b/launch.json: {error}. This machine" in said
    assert "gcloud auth application-default login" in said
    assert not (gcloud / "log").exists()


def test_a_bug_in_the_record_is_no_fault_of_the_bucket(monkeypatch):
    def fail(*_):
        raise KeyError("x")

    monkeypatch.setattr(record, "_write", fail)
    with pytest.raises(KeyError):
        record.write(record.Code(None, None, b""), [], [], "")


def test_preempted_more_often_than_allowed_is_42(gcloud):
    for number in (1, 2, 3):
        life(gcloud, number, PREEMPTED)
    assert go() == 42
    assert verbs(gcloud) == ONE_LIFE * 3


# Every second question for the state fails.
UNSURE = 'n=$(cat n 2>/dev/null || echo 0); [ "$verb" = describe ] && echo $((n+1)) > n'


@pytest.mark.parametrize("code", [0, 1])
def test_a_question_for_the_state_that_fails_gives_no_machine_away(gcloud, monkeypatch, code):
    life(gcloud, 1, f'{UNSURE} && [ $((n % 2)) = 0 ] && exit 1; [ "$n" = 1 ] && state=PROVISIONING')
    monkeypatch.setenv("JOB", f"exit {code}")
    assert go("queued_resource") == code
    assert verbs(gcloud) == ONE_LIFE
    assert int((gcloud / "n").read_text()) >= 4


def test_after_a_crash_the_state_is_believed_at_the_fourth_look(gcloud, monkeypatch):
    monkeypatch.setenv("JOB", "exit 1")
    assert go() == 1
    assert verbs(gcloud) == ONE_LIFE
    assert looks(gcloud) == 2 + 4


def test_an_interrupt_ends_the_looks_after_a_crash(gcloud, monkeypatch):
    life(gcloud, 1, '[ "$verb" = run ] && touch ran')
    life(gcloud, 1, '[ "$verb" = describe ] && [ -e ran ] && kill -TERM $PPID')
    monkeypatch.setenv("JOB", "exit 1")
    assert go() == 128 + signal.SIGTERM
    assert verbs(gcloud) == ONE_LIFE
    assert looks(gcloud) == 2 + 1


def test_bad_input_is_not_repeated_even_where_the_state_is_unknown(gcloud, monkeypatch):
    life(
        gcloud, 1, '[ "$verb" = run ] && touch ran; [ "$verb" = describe ] && [ -e ran ] && exit 1'
    )
    monkeypatch.setenv("JOB", "exit 2")
    assert go() == 2
    assert verbs(gcloud) == ONE_LIFE


@pytest.mark.parametrize("code", [1, 2])
def test_bad_input_and_crashes_are_not_repeated(gcloud, monkeypatch, code):
    monkeypatch.setenv("JOB", f"exit {code}")
    assert go() == code
    assert verbs(gcloud) == ONE_LIFE


def test_a_rejected_first_connection_is_retried(gcloud):
    life(gcloud, 1, '[ "$verb" = scp ] && [ ! -e once ] && touch once && exit 255')
    assert go() == 0
    assert verbs(gcloud) == ["create", "scp", *ONE_LIFE[1:]]


def test_where_there_is_no_room_gclouds_exit_code_is_passed_on(gcloud):
    life(gcloud, 1, '[ "$verb" = create ] && exit 9')
    assert go() == 9
    assert verbs(gcloud) == ["create", "delete"]


@pytest.mark.parametrize("target", ["tpu_vm", "queued_resource"])
def test_the_machines_of_another_run_are_kept(gcloud, capfd, target):
    (gcloud / "taken").write_text("READY\n")
    assert go(target) == 2
    assert [line.split()[3] for line in (gcloud / "log").read_text().splitlines()] == ["describe"]
    said = capfd.readouterr().err
    assert "run1 exists, in state READY. Choose another --name" in said
    group = {"tpu_vm": "tpu-vm", "queued_resource": "queued-resources"}[target]
    assert f"gcloud compute tpus {group} delete run1 --zone=z --quiet" in said


@pytest.mark.parametrize(
    "reason",
    [
        "PERMISSION_DENIED: Permission denied on 'locations/z' (or it may not exist).",
        "You do not currently have an active account selected.",
        "There was a problem refreshing your current auth tokens: ('invalid_grant')",
    ],
)
def test_nothing_is_created_if_gcloud_cannot_check_the_name(gcloud, capfd, reason):
    (gcloud / "refused").write_text(reason)
    assert go() == 2
    assert [line.split()[3] for line in (gcloud / "log").read_text().splitlines()] == ["describe"]
    said = capfd.readouterr().err
    error = f"ERROR: (gcloud.compute.tpus.tpu-vm.describe) {reason}"
    assert f"cannot determine whether run1 exists: {error}" in said
    assert "gcloud auth login" in said and "--zone" in said


def test_machines_that_are_not_found_are_lost_at_the_first_answer(gcloud, monkeypatch):
    life(gcloud, 1, '[ "$verb" = run ] && touch gone && exit 255')
    life(gcloud, 1, '[ "$verb" = describe ] && [ -e gone ] && not_found')
    assert go() == 0
    assert looks(gcloud) == 4  # The name, ready, gone; ready.
    assert verbs(gcloud) == ONE_LIFE * 2


def test_an_unset_state_is_queried_again(gcloud):
    life(gcloud, 1, '[ "$verb" = describe ] && [ ! -e asked ] && touch asked && state=')
    assert go("queued_resource") == 0
    assert verbs(gcloud) == ONE_LIFE


def test_machines_that_could_not_be_deleted_are_reported(gcloud, capfd):
    life(gcloud, 1, PREEMPTED)
    life(gcloud, 1, '[ "$verb" = delete ] && exit 1')
    assert go() == 255
    assert verbs(gcloud) == [*ONE_LIFE[:-1], *["delete"] * 3]  # and no new ones
    assert "could not delete; if it is still there: gcloud compute tpus tpu-vm delete run1" in (
        capfd.readouterr().out
    )


def test_a_finished_job_whose_machines_stay_has_failed(gcloud):
    life(gcloud, 1, '[ "$verb" = delete ] && exit 1')
    assert go() == 1


def test_a_failed_delete_is_retried(gcloud, capfd):
    life(gcloud, 1, '[ "$verb" = delete ] && [ ! -e once ] && touch once && exit 1')
    assert go() == 0
    assert verbs(gcloud) == [*ONE_LIFE, "delete"]
    assert "could not delete" not in capfd.readouterr().out


def test_machines_that_arrive_after_an_interrupted_create_are_deleted(gcloud):
    life(gcloud, 1, '[ "$verb" = create ] && { kill -TERM $PPID; sleep 1000; }')
    life(gcloud, 1, '[ "$verb" = delete ] && [ ! -e once ] && touch once && not_found')
    assert go() == 128 + signal.SIGTERM
    assert verbs(gcloud) == ["create", "delete", "delete"]


@pytest.mark.parametrize("during", ["create", "run"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_the_launcher_deletes_the_machines(gcloud, monkeypatch, during, number):
    up = 'touch "$GCLOUD_STUB/up"; sleep 1000'
    if during == "create":
        life(gcloud, 1, f'[ "$verb" = create ] && {{ {up}; }}')
    monkeypatch.setenv("JOB", up)
    monkeypatch.setenv("PYTHONPATH", str(HERE.parents[1]))
    argv = ["tpu_vm", *OPTIONS, f"--setup={SETUP}", "--", *FLAGS]
    code = (
        "import pathlib, sys; import launch.__main__ as command_line; "
        f"command_line.ROOT = pathlib.Path({str(command_line.ROOT)!r}); "
        f"sys.exit(command_line.main({argv!r}))"
    )
    # Of a terminal that is closed nothing can be written to any more.
    closed = (
        {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if number == signal.SIGHUP else {}
    )
    with running([sys.executable, "-c", code], **closed) as launcher:
        deadline = time.monotonic() + 120
        while not (gcloud / "up").exists():
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        for pipe in (launcher.stdout, launcher.stderr) if closed else ():
            pipe.close()
        launcher.send_signal(number)
        assert launcher.wait(60) == 128 + number
    assert verbs(gcloud) == (["create", "delete"] if during == "create" else ONE_LIFE)
    assert looks(gcloud) == (1 if during == "create" else 2)


def test_a_missing_gcloud_is_reported(gcloud, monkeypatch, capfd):
    (gcloud / "bin" / "gcloud").unlink()
    git = pathlib.Path(shutil.which("git")).resolve()
    (gcloud / "bin" / "git").symlink_to(git)
    monkeypatch.setenv("PATH", f"{gcloud}/bin")
    assert go() == 2
    assert "gcloud" in capfd.readouterr().err


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
@pytest.mark.timeout(900)
def test_the_real_gcloud_would_take_every_command(tmp_path):
    slice_ = tpu.Tpu("run1", "us-east5-a", "v5p-8", "v2-alpha-tpuv5", project="mine", spot=True)
    made = [make(slice_, FLAGS, "/tmp/code.tar.gz") for make in (tpu.tpu_vm, tpu.queued_resource)]
    texts = {
        plans.shell(argv): None
        for plan in made
        for argv in (plan.create, plan.describe, plan.explain, *plan.ship, plan.run, plan.delete)
    }
    commands = tmp_path / "commands.json"
    commands.write_text(json.dumps([{"id": i, "command_string": t} for i, t in enumerate(texts)]))
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={commands}"],
        env={**os.environ, "HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    verdicts = json.loads(done.stdout)
    assert len(verdicts) == len(texts)
    for verdict in verdicts:
        assert verdict["success"], verdict["error_message"]


def test_a_free_port_is_free():
    assert 1024 <= local.free_port() < 65536
