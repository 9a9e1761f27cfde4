"""`--run_mode=memory`: the output of each action, and the settings that it rejects."""

import json
import pathlib
import shlex
import shutil

import gin
import pytest

from glimmer_jax import main as command_line
from glimmer_jax import shipped
from glimmer_jax.memory.store import MemoryStore


@pytest.fixture(autouse=True)
def clear():
    yield
    gin.clear_config()


def run(action, *files, **macros):
    arguments = ["--run_mode=memory", f"--action={action}", "--gin_file=gin/runs/memory.gin"]
    arguments += [f"--gin_file=gin/{file}.gin" for file in files]
    return command_line.main(
        arguments + [f"--gin.{name}={value!r}" for name, value in macros.items()]
    )


def printed(capsys):
    return json.loads(capsys.readouterr().out)


def test_plan_prints_sizes_and_hours_before_anything_runs(capsys):
    model = ("sizes/base", "models/glimmer")
    assert run("plan", *model, NUM_PASSAGES=1_000_000, MEMORY_CODEC="int8") == 0
    planned = printed(capsys)
    assert planned["codec"] == "int8" and planned["bytes_per_token"] == 804
    assert planned["tokens"] == 200_000_000 and planned["shards"] == 977
    assert planned["bytes"] == pytest.approx(200e6 * 804, rel=0.05)
    # 8 layers of 4 D^2 + 3 D F, two operations each, at 100 TFLOP/s.
    layer = 4 * 768 * 768 + 3 * 768 * 2048
    hours = 2 * 200e6 / 1e14 / 3600
    assert planned["device_hours"] == pytest.approx(8 * layer * hours, rel=0.001)
    # The codes of pq: the turn, and 256 centroids in each subspace.
    gin.clear_config()
    assert run("plan", *model, NUM_PASSAGES=1_000_000, MEMORY_CODEC="pq") == 0
    codes = (256 + 768) * 768
    assert printed(capsys)["device_hours"] == pytest.approx((8 * layer + codes) * hours, rel=0.001)


def test_stores_are_inspected_verified_withdrawn_from_and_merged(
    tiny, copied_store, tmp_path, capsys
):
    memory, ids = str(copied_store), tiny.TinyPassages().ids
    assert run("inspect", MEMORY_DIR=memory, PASSAGE=int(ids[3])) == 0
    assert printed(capsys)[0]["row"] == 3
    assert run("verify", MEMORY_DIR=memory, VERIFY_SHARDS=2) == 0
    verified = {"verified": memory, "version": 1, "shards": 4, "shards_read": 2}
    assert printed(capsys) == verified
    assert run("withdraw", MEMORY_DIR=memory, IDS=[int(ids[3])]) == 0
    assert printed(capsys)["passages"] == 22
    assert run("inspect", MEMORY_DIR=memory, VERSION=1) == 0
    assert printed(capsys)["passages"] == 23
    other = tiny.TinyPassages(count=4, seed=7)
    other.ids = other.ids + 1
    tiny.build_tiny(tmp_path / "other", other)
    parts = [memory, str(tmp_path / "other")]
    assert run("merge", MEMORY_DIR=str(tmp_path / "merged"), PARTS=parts) == 0
    assert printed(capsys)["passages"] == 26
    assert len(MemoryStore.open(tmp_path / "merged")) == 27
    (copied_store / "shards" / "000002" / "shard.json").unlink()
    assert run("verify", MEMORY_DIR=memory) == 2
    assert "shards/000002/shard.json is missing. Repair it with" in capsys.readouterr().err


def test_the_documented_commands_run_as_they_stand(tiny_store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_store, "runs/memory")
    text = (pathlib.Path(shipped.root()) / "docs" / "memory.md").read_text(encoding="utf-8")
    block = text.partition("\n## Maintenance\n")[2].split("```sh\n")[2].split("```")[0]
    # Of the built-in corpus; this one has others.
    block = block.replace("json.dumps", "TITLE")
    names = {}
    for line in block.replace("\\\n", "").splitlines():
        if not line.strip():
            continue
        if not line.startswith("glimmer"):
            name, _, value = line.partition("=")
            names[f"${name}"] = shlex.split(value)[0]
            continue
        # As a shell does: what a variable holds is cut at spaces, its quotation marks stay.
        words = [names[word].split() if word in names else [word] for word in shlex.split(line)]
        flags = [flag for some in words for flag in some]
        assert command_line.main(flags[1:]) == 0, line
        gin.clear_config()
        said = json.loads(capsys.readouterr().out)
    assert (said["verified"], said["shards_read"]) == ("runs/memory", 4)


@pytest.mark.parametrize(
    ("action", "files", "macros", "message"),
    [
        ("burn", (), {}, "ACTION must be one of plan, inspect, verify"),
        ("plan", (), {}, "--action=plan needs a model: give a size (gin/sizes)"),
        ("inspect", (), {}, "MEMORY_DIR"),
        ("withdraw", (), {"MEMORY_DIR": "m"}, "IDS"),
        ("merge", (), {"MEMORY_DIR": "m"}, "PARTS needs two or more stores"),
        (
            "append",
            ("sizes/tiny", "models/lumen"),
            {"MEMORY_DIR": "m", "PASSAGES_DIR": "p"},
            "CHECKPOINT_PATH",
        ),
    ],
)
def test_missing_settings_of_an_action_are_reported(capsys, action, files, macros, message):
    assert run(action, *files, **macros) == 2
    assert message in capsys.readouterr().err
