"""The recipe of the shipped checkpoints: its order, its seeds, its record, with training left out."""

import json
from pathlib import Path

import gin
import jax
import pytest

from experiments import train_pydocs
from glimmer_jax import configuration
from glimmer_jax.main import MODES, _find
from glimmer_jax.models.recut import recut

LOSS = {"train/alive_seconds": 90.4, "train/cross_entropy": 1.0, "train/recall_at_1": 0.5}


class Commands:
    """Stands in for `glimmer`: keeps every command, leaves the files that the recipe reads."""

    def __init__(self):
        self.ran = []
        self.fail_at = None
        self.first_tokens = {}  # run -> loss of the first token

    def __call__(self, mode, *gin_files, devices=None, **macros):
        if len(self.ran) == self.fail_at:
            raise SystemExit(42)
        self.ran.append((mode, gin_files, macros))
        if mode == "train":
            run = macros["MODEL_DIR"]
            (run / "train").mkdir(parents=True, exist_ok=True)
            first_token = self.first_tokens.get(run.name, 0.1)
            rows = [
                {"step": step, "train/first_token": first_token, **LOSS}
                for step in (macros["TRAIN_STEPS"] // 2, macros["TRAIN_STEPS"])
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (run / "train" / "metrics.jsonl").write_text(text)
        elif mode == "eval":
            macros["EVAL_OUTPUT_DIR"].mkdir(parents=True, exist_ok=True)
            found = {"pydocs_slot_filling/accuracy": 0.5, "mean": 0.5, "tflop_per_question": 1.0}
            (macros["EVAL_OUTPUT_DIR"] / "metrics.json").write_text(json.dumps(found))
        elif mode == "export":
            path = Path(macros["OUTPUT_PATH"])
            path.write_bytes(b"parameters")
            path.with_suffix(".json").write_text("{}")

    def runs(self):
        return [macros["MODEL_DIR"].name for mode, _, macros in self.ran if mode == "train"]


@pytest.fixture
def commands(monkeypatch, tmp_path):
    found = Commands()
    monkeypatch.setattr(train_pydocs, "glimmer", found)
    monkeypatch.chdir(tmp_path)
    Path("data/pydocs/retrieved").mkdir(parents=True)
    yield found
    gin.clear_config()


def make(*flags):
    train_pydocs.main(["--output=runs", "--export=out", *flags])


def record():
    return json.loads(Path("runs/record.json").read_text())


def test_one_start_then_every_model_from_it(commands):
    make()
    assert commands.runs()[:2] == ["start_start1_0", "start_start2"]
    stages = [stage.name for stage in train_pydocs.MODEL_STAGES]
    assert commands.runs()[2:] == [f"{m}_{s}" for m in train_pydocs.CUTS for s in stages]
    began = {m["MODEL_DIR"].name: m.get("INITIAL_CHECKPOINT_PATH") for _, _, m in trained(commands)}
    for model in train_pydocs.CUTS:
        assert began[f"{model}_read"] == Path("out/pydocs_start.safetensors")
        assert began[f"{model}_choose"] == Path(f"runs/{model}_read")
        assert Path(f"out/pydocs_{model}.safetensors").is_file()
        last = record()["stages"][f"{model}_{stages[-1]}"]
        assert last["test"]["mean"] == 0.5 and last["dev"]["mean"] == 0.5
        assert last["seconds"] == 90
    # An evaluation reads ten passages, whatever the stage has read.
    assert {m["TASK_FEATURE_LENGTHS"]["passages"] for o, _, m in commands.ran if o == "eval"} == {
        (10, 120)
    }
    # Test is read once for each model, after everything else about it is decided.
    splits = [macros["MIXTURE_OR_TASK_SPLIT"] for mode, _, macros in commands.ran if mode == "eval"]
    assert splits.count("test") == len(train_pydocs.CUTS)
    assert Path("out/learning_curves.png").read_bytes().startswith(b"\x89PNG")


def trained(commands):
    return [one for one in commands.ran if one[0] == "train"]


def test_the_start_learns_only_exercises(commands):
    make("--models=start")
    for _, gin_files, macros in trained(commands):
        assert gin_files == ("examples/pydocs_start_train",)
        assert macros.get("MIXTURE_OR_TASK_NAME", "pydocs_reading_1").startswith("pydocs_reading")
        assert "DATA_DIR" not in macros


def test_stages_and_seeds_have_disjoint_streams(commands):
    make()
    streams = {
        macros["MODEL_DIR"].name: macros["RANDOM_SEED"] for _, _, macros in trained(commands)
    }
    for model in train_pydocs.CUTS:
        chain = [s for name, s in streams.items() if name.startswith(("start", model))]
        assert len(set(chain)) == len(chain)
    # All models read the same examples in the same order.
    assert len({streams[f"{model}_choose"] for model in train_pydocs.CUTS}) == 1
    commands.ran.clear()
    train_pydocs.main(["--output=other", "--export=out", "--seed=1"])
    others = {macros["RANDOM_SEED"] for _, _, macros in trained(commands)}
    assert not others & set(streams.values())


def test_a_killed_training_resumes_and_a_finished_one_trains_nothing(commands):
    commands.fail_at = 7
    with pytest.raises(SystemExit) as stopped:
        make()
    assert stopped.value.code == 42
    before = commands.runs()
    commands.fail_at = None
    make()
    again = commands.runs()[len(before) :]
    assert not set(again) & set(before) - {before[-1]}
    commands.ran.clear()
    make()
    assert commands.runs() == []


def test_a_folder_of_another_seed_or_initialisation_is_rejected(commands):
    make("--models=start")
    for flags in (["--seed=1"], ["--initial=out"]):
        with pytest.raises(SystemExit, match="--output: runs .*another folder"):
            make(*flags)


def test_the_first_stage_is_retried_until_a_model_chooses(commands):
    commands.first_tokens = {"start_start1_0": 0.69, "start_start1_1": 0.6}
    make("--models=start")
    assert commands.runs() == [*(f"start_start1_{i}" for i in range(3)), "start_start2"]
    assert trained(commands)[-1][2]["INITIAL_CHECKPOINT_PATH"] == Path("runs/start_start1_2")
    commands.first_tokens = {f"start_start1_{i}": 0.69 for i in range(train_pydocs.MAX_ATTEMPTS)}
    with pytest.raises(SystemExit, match=r"None of 5 attempts .* 0\.35 nats.*--seed"):
        train_pydocs.main(["--output=others", "--export=out", "--models=start"])


def test_models_can_start_from_files_of_initial(commands):
    with pytest.raises(
        SystemExit, match=r"out/pydocs_start\.safetensors: expected.*--models=start"
    ):
        make("--models=fid")
    Path("given").mkdir()
    Path("given/pydocs_fid.safetensors").write_bytes(b"parameters")
    make("--models=fid", "--initial=given")
    first = trained(commands)[0][2]
    assert first["INITIAL_CHECKPOINT_PATH"] == Path("given/pydocs_fid.safetensors")
    with pytest.raises(SystemExit):
        make("--models=typo")


def configured(mode, gin_files, macros):
    bindings = [
        f"{k} = {str(v)!r}" if isinstance(v, Path) else f"{k} = {v!r}" for k, v in macros.items()
    ]
    configuration.parse([f"gin/{file}.gin" for file in gin_files], bindings)
    function = _find(MODES[mode].function)
    configuration.configured(function)
    return gin.get_bindings(function)


def test_every_command_of_the_training_is_a_valid_configuration(commands):
    make()
    seen = {}
    for mode, gin_files, macros in commands.ran:
        arguments = configured(mode, gin_files, macros)
        if mode == "train":
            seen[macros["MODEL_DIR"].name] = arguments["model"].config
    assert seen["lumen_read"].freeze_memory and not seen["glimmer_read"].freeze_memory
    assert seen["fid_read"].memory_layers == 0
    assert [seen[f"glimmer_{name}"].num_kept for name in ("read", "choose", "ten")] == [1, 3, 3]


def test_the_start_can_be_recut_anywhere_after_training(commands):
    make("--models=start")
    # The export has no cut of its own.
    assert commands.ran[-1][:2] == ("export", ("runs/export",))
    start = configured(*trained(commands)[-1])["model"]
    assert start.config.share_position_table
    shapes, _ = start.abstract_variables()
    # Like trained parameters, no two tensors are equal.
    count = iter(range(10**6))
    params = jax.tree.map(lambda leaf: jax.numpy.full(leaf.shape, float(next(count))), shapes)
    for alpha in (0.15, 0.3, 0.6, 0.86):
        target = configured(
            "train",
            ("examples/pydocs_glimmer_train",),
            {"MODEL_DIR": "m", "TRAIN_STEPS": 1, "ALPHA": alpha, "BETA": 0.5},
        )["model"]
        wanted, _ = target.abstract_variables()
        found = recut(params, start.config, target.config)
        assert jax.tree.map(lambda x: x.shape, found) == jax.tree.map(lambda x: x.shape, wanted)
