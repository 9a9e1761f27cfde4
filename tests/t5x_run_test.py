"""T5X's own train, eval and infer, from our gin files, through all steps; skipped without T5X."""

import functools
import json
import shutil
import sys
import types
import warnings

import gin
import jax
import numpy as np
import pytest

from glimmer_jax import shipped, t5x_adapter
from glimmer_jax.pydocs.questions import TASKS
from tests.main_test import data, work  # noqa: F401 (fixture)
from tests.models import tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("t5x.train")
    import t5x.eval
    import t5x.infer
    import t5x.train
    from t5x import gin_utils

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.modes import evaluate as evaluate_mode
from glimmer_jax.modes import settings
from glimmer_jax.modes.checkpoint import CheckpointConfig
from glimmer_jax.modes.export import export
from glimmer_jax.modes.settings import AnsweringConfig, CorpusConfig, DatasetConfig
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.serving import predictor
from glimmer_jax.weights import t5_names
from glimmer_jax.weights.load import load
from glimmer_jax.weights.t5x import save_tree
from tests.weights.t5x_test import write

# T5X warns, and promotes ranks, as it likes.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

LENGTHS = {"inputs": 24, "targets": 16, "passages": (3, 16)}
SIZE = """
from __gin__ import dynamic_registration
from glimmer_jax.models import t5
t5.T5Config:
    emb_dim = 8
    num_heads = 2
    head_dim = 4
    mlp_dim = 16
    num_decoder_layers = 1
    mlp_activations = ("gelu", "linear")
"""
SETTINGS = {
    "VOCABULARY": "pydocs",
    "NUM_ENCODER_LAYERS": 3,
    "MATMUL_DTYPE": None,
    "MIXTURE_OR_TASK_NAME": "pydocs",
    "MIXTURE_OR_TASK_MODULE": "tasks.pydocs",
    "TASK_FEATURE_LENGTHS": LENGTHS,
}
# Number of devices -> the mesh over as many.
MESHES = {
    1: MeshConfig(data=1),
    4: MeshConfig(data=1, fsdp=2, model=2),
    8: MeshConfig(data=2, fsdp=2, model=2),
}
CUTS = {
    "fid": {},
    "lumen": {"ALPHA": 0.67},
    "glimmer": {"ALPHA": 0.67, "BETA": 0.5, "NUM_KEPT": 2},
}
RUNS = [(model, count) for model in CUTS for count in (1, 4)] + [("glimmer", 8)]


@pytest.fixture(autouse=True)
def t5x_process(monkeypatch):
    """What a command line of T5X is: its function in `__main__`. And jax forbids `with mesh:`."""
    main = types.ModuleType("__main__")
    main.train, main.evaluate, main.infer = t5x.train.train, t5x.eval.evaluate, t5x.infer.infer
    monkeypatch.setitem(sys.modules, "__main__", main)
    shipped.make_importable()
    gin.enter_interactive_mode()  # a process of T5X reads its gin files only once
    jax.config.update("jax_disallow_mesh_context_manager", True)
    with jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disallow_mesh_context_manager", False)
    gin.exit_interactive_mode()
    gin.clear_config(clear_constants=True)


@pytest.fixture
def devices(monkeypatch, request):
    """The mesh is over the first so many devices, T5X's and ours."""
    count = request.param
    over_some = functools.partial(make_mesh, devices=jax.devices()[:count])
    for module in (t5x_adapter, settings, predictor):
        monkeypatch.setattr(module, "make_mesh", over_some)
    for axis, size in MESHES[count].sizes().items():
        monkeypatch.setitem(SETTINGS, f"MESH_{axis.upper()}", size)
    return count


def configure(work, model, run, **settings):  # noqa: F811
    gin.clear_config(clear_constants=True)
    size = work / "size.gin"
    size.write_text(SIZE)
    files = ["gin/sizes/tiny.gin", str(size), f"gin/models/{model}.gin", f"gin/t5x/{run}.gin"]
    given = {**SETTINGS, **CUTS[model], **data(work), **settings}
    bindings = [f"{name} = {value!r}" for name, value in given.items()]
    paths = [str(shipped.root()), *t5x.train._DEFAULT_GIN_SEARCH_PATHS]
    gin_utils.parse_gin_flags(paths, files, bindings)


def run(function):
    return gin.get_configurable(function)()


def start_of(work, model, folder):  # noqa: F811
    """A T5 in T5X's first form, made into the model's start: (model, folder)."""
    configure(work, model, "finetune", MODEL_DIR="m", TRAIN_STEPS=1, INITIAL_CHECKPOINT_PATH="c")
    made = gin.get_configurable("glimmer_jax.models.model.GlimmerModel")()
    (folder / "t5").mkdir()
    write(folder / "t5", t5_names.flat_from(tiny.params(GlimmerConfig(made.config.t5))))
    start = CheckpointConfig(str(folder / "t5"), made, vocabulary="pydocs")
    export(start, str(folder / "checkpoint_0"), "t5x_adapter")
    return made, folder / "checkpoint_0"


def read(folder):
    return jax.tree.map(np.asarray, load(folder).params)


def train(work, model, start, model_dir, steps):  # noqa: F811
    configure(
        work,
        model,
        "finetune",
        MODEL_DIR=str(model_dir),
        INITIAL_CHECKPOINT_PATH=str(start),
        TRAIN_STEPS=steps,
        BATCH_SIZE=8,
        CHECKPOINT_EVERY=3,
        EVAL_PERIOD=3,
        EVAL_STEPS=1,
        EVALUATOR_NUM_EXAMPLES=4,
    )
    step, _ = run(t5x.train.train)
    assert step == steps
    return read(model_dir / f"checkpoint_{steps}")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model, devices", RUNS, indirect=["devices"])
def test_train_resume_eval_and_infer_of_t5x_drive_our_models(work, tmp_path, model, devices):  # noqa: F811
    ours, start = start_of(work, model, tmp_path)
    trained = train(work, model, start, tmp_path / "a", 5)
    began = read(start)
    frozen = jax.tree.leaves(ours.frozen(began))
    moved = [(x != y).any() for x, y in zip(*map(jax.tree.leaves, (trained, began)), strict=True)]
    assert any(moved) and not any(
        moves and still for moves, still in zip(moved, frozen, strict=True)
    )

    # Stopped at 3, and started again.
    shutil.copytree(tmp_path / "a" / "checkpoint_3", tmp_path / "b" / "checkpoint_3")
    tiny.assert_trees_equal(train(work, model, start, tmp_path / "b", 5), trained)

    checkpoint = str(tmp_path / "a" / "checkpoint_5")
    files = data(work)
    wanted = evaluate_mode.evaluate(
        AnsweringConfig(checkpoint, ours, vocabulary="pydocs", mesh=MESHES[devices]),
        DatasetConfig("pydocs", LENGTHS, 8, "test", "tasks.pydocs", files["DATA_DIR"]),
        CorpusConfig(files["PASSAGES_DIR"]),
        output_dir=str(tmp_path / "ours"),
    )
    configure(
        work,
        model,
        "eval",
        CHECKPOINT_PATH=checkpoint,
        EVAL_OUTPUT_DIR=str(tmp_path / "eval"),
        BATCH_SIZE=8,
    )
    run(t5x.eval.evaluate)
    metrics = sorted((tmp_path / "eval" / "inference_eval").glob("*-metrics.jsonl"))
    wanted_files = sorted(f"pydocs_{task}-metrics.jsonl" for task in TASKS)
    assert [path.name for path in metrics] == wanted_files
    for path in metrics:
        task = path.name.removesuffix("-metrics.jsonl")
        got = json.loads(path.read_text().splitlines()[-1])
        assert len(got) > 1
        for name in got.keys() - {"step"}:
            assert got[name] == pytest.approx(wanted[f"{task}/{name}"]), (task, name)

    configure(
        work,
        model,
        "infer",
        CHECKPOINT_PATH=checkpoint,
        INFER_OUTPUT_DIR=str(tmp_path / "infer"),
        BATCH_SIZE=8,
    )
    run(t5x.infer.infer)
    written = sorted((tmp_path / "infer").glob("pydocs_*-predict_with_aux.jsonl-00000-of-00001"))
    assert len(written) == len(TASKS)
    for path in written:
        task = path.name.split("-")[0]
        mine = (tmp_path / "ours" / f"predictions-{task}.jsonl").read_text().splitlines()
        for theirs, own in zip(path.read_text().splitlines(), mine, strict=True):
            theirs, own = json.loads(theirs), json.loads(own)
            assert theirs["prediction"] == own["prediction"]
            np.testing.assert_allclose(theirs["aux"]["scores"], own["score"], rtol=1e-5)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("devices", [4], indirect=True)
def test_t5x_trains_around_fixed_codebooks(work, tmp_path, monkeypatch, devices):  # noqa: F811
    monkeypatch.setitem(SETTINGS, "MEMORY_CODEC", "pq")
    start = tmp_path / "checkpoint_0"
    configure(
        work, "glimmer", "finetune", MODEL_DIR="m", TRAIN_STEPS=1, INITIAL_CHECKPOINT_PATH="c"
    )
    ours = gin.get_configurable("glimmer_jax.models.model.GlimmerModel")()
    save_tree(start, tiny.params(ours.config))
    began = read(start)["memory_codebooks"]
    trained = train(work, "glimmer", start, tmp_path / "a", 3)["memory_codebooks"]
    jax.tree.map(np.testing.assert_array_equal, trained, began)
