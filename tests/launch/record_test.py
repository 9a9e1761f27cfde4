"""The record of a launch: the code as git sees it, where launch.json goes, what it says."""

import errno
import json
import os
import subprocess
import tarfile

import pytest

import launch.__main__ as launch_command
from glimmer_jax.main import parse_flags
from launch import record


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "kept.py").write_text("one\n")
    (folder / ".gitignore").write_text("ignored\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=first")
    return folder


def test_a_clean_tree_has_no_diff(checkout):
    code = record.code(checkout)
    assert len(code.commit) == len(code.tree) == 40
    assert code.diff == b""
    assert code.diff_sha256 is None
    assert set(code.annotations()) == {"glimmer/commit"}


def test_changes_and_new_files_are_in_the_diff_and_in_the_archive(checkout, tmp_path):
    clean = record.code(checkout)
    (checkout / "kept.py").write_bytes(b"two \xff\n")
    (checkout / "new.py").write_text("new\n")
    (checkout / "ignored").write_text("no\n")
    code = record.code(checkout)
    assert code.commit == clean.commit
    assert code.tree != clean.tree
    assert b"two \xff" in code.diff and b"new.py" in code.diff and b"ignored\n+no" not in code.diff
    assert code == record.code(checkout)
    status = subprocess.run(["git", "-C", checkout, "status", "--short"], capture_output=True)
    assert b"?? new.py" in status.stdout  # the person's own index is as it was

    path = str(tmp_path / "code.tar.gz")
    record.pack(checkout, code, path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    with tarfile.open(path) as archive:
        assert sorted(archive.getnames()) == [".gitignore", "kept.py", "new.py"]
        assert archive.extractfile("kept.py").read() == b"two \xff\n"


def test_what_git_cannot_read_is_not_left_out_in_silence(checkout, monkeypatch, capsys):
    (checkout / "kept.py").write_text("two\n")
    # A nested repository without commits.
    (checkout / "nested").mkdir()
    git(checkout / "nested", "init", "--quiet")
    with pytest.raises(ValueError, match="git could not read all files of .*checkout"):
        record.code(checkout)
    monkeypatch.setattr(launch_command, "ROOT", checkout)
    assert launch_command.main(["local", "--num_processes=1", "--", "--run_mode=train"]) == 2
    assert "launch: git could not read" in capsys.readouterr().err


def test_a_checkout_that_git_does_not_read_is_reported(checkout, monkeypatch, capsys):
    # As for another user's checkout, or where git is missing.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(checkout.parent))
    (checkout / ".git" / "HEAD").unlink()
    with pytest.raises(ValueError, match="is a checkout, but git cannot read it.*safe.directory"):
        record.code(checkout)
    monkeypatch.setattr(launch_command, "ROOT", checkout)
    assert launch_command.main(["local", "--num_processes=1", "--", "--run_mode=train"]) == 2
    assert "could not be recorded" in capsys.readouterr().err.replace("\n", " ")


def test_code_that_cannot_be_packed_is_reported(checkout, tmp_path, monkeypatch):
    code = record.code(checkout)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert f"glimmer-{os.getuid()}-" in record.archive_path(code)
    with pytest.raises(ValueError, match="git could not pack the code"):
        record.pack(
            checkout, record.Code(code.commit, "0" * 40, b""), str(tmp_path / "code.tar.gz")
        )
    assert not (tmp_path / "code.tar.gz").exists()


def test_of_a_folder_inside_another_checkout_nothing_is_known(checkout):
    (checkout / "site-packages").mkdir()
    assert record.code(checkout / "site-packages") == record.Code(None, None, b"")


@pytest.mark.parametrize(
    ("flags", "path"),
    [
        (["--run_mode=train", "--gin.MODEL_DIR='runs/a'"], "runs/a/launch.json"),
        (["--gin.MODEL_DIR='a'", "--gin.MODEL_DIR='b'"], "b/launch.json"),
        (["--gin_bindings=MODEL_DIR = 'gs://b/a'"], "gs://b/a/launch.json"),
        (
            ["--run_mode=eval", "--gin.EVAL_OUTPUT_DIR='out'", "--gin.MEMORY_DIR='m'"],
            "out/launch.json",
        ),
        (["--run_mode=build_memory", "--gin.MEMORY_DIR='m/'"], "m.launch.json"),
        (["--run_mode=memory", "--gin.MEMORY_DIR='m'"], "m.launch.json"),
        (["--run_mode=codebooks", "--gin.OUTPUT_PATH='a/b'"], "a/b.launch.json"),
        (["--run_mode=infer", "--gin.INFER_OUTPUT_DIR='a'"], "a/launch.json"),
        (["--run_mode=train", "--gin.MODEL_DIR=%HERE"], "launch.json"),
        (["--run_mode=score"], "launch.json"),
    ],
)
def test_the_record_is_beside_the_run(flags, path):
    assert str(record.record_path(parse_flags(flags))) == path


def test_a_second_launch_keeps_the_record_of_the_first(tmp_path):
    run = tmp_path / "run"
    flags = ["--run_mode=train", f"--gin.MODEL_DIR={str(run)!r}"]
    code = record.Code("c" * 40, "d" * 40, b"a diff")
    record.write(code, ["local", "--", *flags], flags, "one\ntwo\n")
    record.write(code, ["again"], flags, "")
    assert json.loads((run / "launch.json").read_text())["argv"] == ["again"]
    [first] = run.glob("launch.*Z.json")
    kept = json.loads(first.read_text())
    assert kept["argv"] == ["local", "--", *flags]
    assert kept["plan"] == ["one", "two"]
    assert kept["commit"] == "c" * 40
    assert kept["diff_sha256"] == code.diff_sha256
    assert (run / f"launch.{code.diff_sha256[:16]}.diff").read_bytes() == b"a diff"


def test_a_record_that_was_cut_short_is_kept_and_bars_no_launch(tmp_path, capfd):
    run = tmp_path / "run"
    run.mkdir()
    flags = ["--run_mode=train", f"--gin.MODEL_DIR={str(run)!r}"]
    code = record.Code("c" * 40, "d" * 40, b"")
    elsewhere = '{"time": "/../../../stolen"}'
    for text in ('{"time": "2026', "[]", "{}", "[" * 100_000, '{"time": 7}', elsewhere):
        (run / "launch.json").write_text(text)
        record.write(code, ["local"], flags, "")
        assert json.loads((run / "launch.json").read_text())["argv"] == ["local"]
        assert "launch.json is damaged; it is kept as " in capfd.readouterr().out
        assert text in [path.read_text() for path in run.glob("launch.damaged.*.json")]


def test_a_record_is_written_atomically(tmp_path, monkeypatch):
    flags = ["--run_mode=train", f"--gin.MODEL_DIR={str(tmp_path / 'run')!r}"]

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(record.os, "replace", fail)
    with pytest.raises(ValueError, match="launch.json .*written.*Input/output"):
        record.write(record.Code(None, None, b""), ["local"], flags, "")
    assert not list((tmp_path / "run").iterdir())


def test_local_records_are_readable_only_by_their_owner(tmp_path):
    run = tmp_path / "run"
    flags = ["--run_mode=train", f"--gin.MODEL_DIR={str(run)!r}"]
    for _ in range(2):
        record.write(record.Code("c" * 40, "d" * 40, b"a diff"), ["local"], flags, "")
    files = list(run.iterdir())
    assert len(files) == 3 and {path.stat().st_mode & 0o777 for path in files} == {0o600}


@pytest.mark.parametrize(
    "argv, shown",
    [
        (["tpu_vm", "--env=TOKEN=s3cret=x"], ["tpu_vm", "--env=TOKEN=***"]),
        (["--env", "TOKEN=s3cret", "--spot"], ["--env", "TOKEN=***", "--spot"]),
        (["--env=TOKEN=", "--env=TOKEN"], ["--env=TOKEN=***", "--env=TOKEN"]),
        (["--name=a"], ["--name=a"]),
    ],
)
def test_values_of_variables_are_hidden(argv, shown):
    assert record.without_secrets(argv) == shown


@pytest.mark.parametrize(
    "target",
    [
        ["tpu_vm", "--zone=z", "--accelerator_type=v5p-8", "--version=v"],
        ["jobset", "--image=i", "--tpu=v5e", "--topology=2x2"],
        ["xm", "jobset", "--image=i", "--tpu=v5e", "--topology=2x2"],
    ],
)
def test_no_plan_shows_the_value_of_a_variable(target, capsys):
    options = ["--name=run1", "--env=TOKEN=s3cret"]
    flags = ["--", "--run_mode=train", "--gin.MODEL_DIR='gs://b/r'"]
    own = [target[0], "--dry_run", *target[1:], *options]
    assert launch_command.main([*own, *flags]) == 0
    shown = capsys.readouterr().out
    assert "TOKEN" in shown and "***" in shown and "s3cret" not in shown
