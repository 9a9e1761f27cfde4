"""Every shipped gin file parses, finalises, and builds what it configures without computing."""

import ast
import errno
import importlib.metadata
import pathlib
import re

import gin
import jax
import pytest

from glimmer_jax import configuration, shipped
from glimmer_jax.main import MODES
from glimmer_jax.models.model import DecodeConfig, GlimmerModel
from glimmer_jax.modes.settings import CorpusConfig, DatasetConfig, flatten
from glimmer_jax.storage import errors as storage_errors

ROOT = shipped.root() / "gin"
SIZES = sorted(
    path.relative_to(ROOT / "sizes").with_suffix("").as_posix()
    for path in (ROOT / "sizes").rglob("*.gin")
)
MODELS = ("fid", "lumen", "glimmer")
EXAMPLES = sorted((ROOT / "examples").glob("*.gin"))
ABLATIONS = sorted((ROOT / "ablations").glob("*.gin"))

MODEL_DIR = "MODEL_DIR = 'm'"
CHECKPOINT = "CHECKPOINT_PATH = 'c'"
TASK = [
    "MIXTURE_OR_TASK_NAME = 'pydocs'",
    "MIXTURE_OR_TASK_MODULE = 'tasks.pydocs'",
    "TASK_FEATURE_LENGTHS = {'inputs': 48, 'targets': 32, 'passages': (40, 304)}",
]
# Run file -> mode, and what it requires.
RUNS = {
    "passages": (
        "passages",
        ["CORPUS = 'pydocs'", "PASSAGES_DIR = 'p'", "VOCABULARY = 'pydocs'"],
    ),
    "retrieve": ("retrieve", ["PASSAGES_DIR = 'p'", "QUESTIONS = 'q'", "DATA_DIR = 'd'"]),
    "cache": ("cache", [*TASK[:2], "DATA_DIR = 'd'", "CACHE_DIR = 'c'"]),
    "finetune": ("train", [MODEL_DIR, *TASK, "TRAIN_STEPS = 5", "PASSAGES_DIR = 'p'"]),
    "pretrain": ("train", [MODEL_DIR, *TASK, "TRAIN_STEPS = 5", "PASSAGES_DIR = 'p'"]),
    "codebooks": (
        "codebooks",
        [CHECKPOINT, "PASSAGES_DIR = 'p'", "OUTPUT_PATH = 'o'", "MEMORY_CODEC = 'pq'"],
    ),
    "build_memory": ("build_memory", [CHECKPOINT, "PASSAGES_DIR = 'p'", "MEMORY_DIR = 'm'"]),
    "memory": ("memory", ["ACTION = 'inspect'", "MEMORY_DIR = 'm'"]),
    "eval": ("eval", [CHECKPOINT, *TASK[:2]]),
    "infer": ("infer", [CHECKPOINT, "PASSAGES_DIR = 'p'"]),
    "serve": ("serve", [CHECKPOINT, "PASSAGES_DIR = 'p'"]),
    "score": ("score", ["PREDICTIONS = 'p'", "QUESTIONS = 'q'"]),
    "export": ("export", [CHECKPOINT, "OUTPUT_PATH = 'o.safetensors'"]),
    "export_program": (
        "export",
        [
            CHECKPOINT,
            "OUTPUT_PATH = 'o'",
            "BUCKETS = [{'inputs': 4, 'targets': 3, 'passages': (25, 8)}]",
        ],
    ),
}
# Ending of an example's name -> mode, and what it requires.
EXAMPLE_RUNS = {
    "passages": ("passages", []),
    "retrieve": ("retrieve", []),
    "train": ("train", [MODEL_DIR, "TRAIN_STEPS = 5"]),
    "eval": ("eval", [CHECKPOINT]),
    "infer": ("infer", [CHECKPOINT]),
    "serve": ("serve", [CHECKPOINT]),
}


@pytest.fixture(autouse=True)
def clear():
    yield
    gin.clear_config()


def arguments(mode):
    """What the mode's function would be called with."""
    from glimmer_jax.main import _find

    function = _find(MODES[mode].function)
    configuration.configured(function)
    return flatten(gin.get_bindings(function))


def parameter_count(model):
    shapes, names = model.abstract_variables()
    assert jax.tree.structure(shapes) == jax.tree.structure(
        names, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_every_file_is_covered_and_none_is_python():
    assert {path.stem for path in (ROOT / "runs").glob("*.gin")} == set(RUNS)
    assert {mode for mode, _ in RUNS.values()} == set(MODES)
    assert {path.stem.split("_")[-1] for path in EXAMPLES} == set(EXAMPLE_RUNS)
    assert not list(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.gin")), ids=lambda path: path.stem)
def test_files_document_what_they_provide_and_require(path):
    head = pathlib.Path(path).read_text().split("\n\n")[0]
    assert "# Provides: " in head
    assert "# Requires: " in head


@pytest.mark.parametrize("run", RUNS)
def test_runs_parse_and_finalise(run):
    mode, required = RUNS[run]
    model = ["gin/sizes/small.gin", "gin/models/glimmer.gin"]
    configuration.parse([*(model if mode == "train" else ()), f"gin/runs/{run}.gin"], required)
    bound = arguments(mode)
    assert bound
    if mode in ("codebooks", "build_memory", "eval", "infer", "serve", "export"):
        # A model that is given counts, whatever the order of the files.
        assert bound["model"] is None
        for files in ([*model, f"gin/runs/{run}.gin"], [f"gin/runs/{run}.gin", *model]):
            configuration.parse(files, required)
            given = arguments(mode)["model"]
            assert isinstance(given, GlimmerModel) and given.config.num_kept == 25


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", MODELS)
def test_models_of_all_sizes_build_abstractly(model, size):
    mode, required = RUNS["eval"]
    files = [f"gin/sizes/{size}.gin", f"gin/models/{model}.gin", "gin/runs/eval.gin"]
    configuration.parse(files, required)
    built = arguments(mode)["model"]
    assert isinstance(built, GlimmerModel)
    layers = built.config.t5.num_encoder_layers
    cut = (built.config.memory_layers, built.config.rerank_layers)
    # GLIMMER (arXiv 2306.10231), alpha 1/3 and beta 1/4.
    glimmer = {6: (4, 1), 7: (5, 1), 8: (5, 1), 12: (8, 1), 24: (16, 2)}[layers]
    assert cut == {"fid": (0, 0), "lumen": (glimmer[0], 0), "glimmer": glimmer}[model]
    if model == "fid":
        # Published counts of T5 v1.1 and of T5 1.0, in millions.
        wanted = {"tiny": 2, "small": 77, "base": 248, "large": 783, "xl": 2850, "xxl": 11135}
        old = {"small": 61, "base": 223, "large": 738, "3b": 2852, "11b": 11307}
        wanted |= {f"t5_1_0/{name}": count for name, count in old.items()}
        assert parameter_count(built) / 1e6 == pytest.approx(wanted[size], rel=0.1)


@pytest.mark.parametrize("size", ["base", "large", "xl", "xxl"])
@pytest.mark.parametrize("model", MODELS)
def test_fidos_decoder_goes_with_any_model(model, size):
    mode, required = RUNS["eval"]
    files = [f"gin/sizes/{size}.gin", f"gin/models/{model}.gin"]
    files += ["gin/decoders/fido.gin", "gin/runs/eval.gin"]
    configuration.parse(files, required)
    t5 = arguments(mode)["model"].config.t5
    attending = [i for i in range(t5.num_decoder_layers) if t5.attends(i)]
    # arXiv 2212.08153: layers 5, 11, 17, 23 of 24.
    assert attending == [5, 11, 17, 23][: t5.num_decoder_layers // 6]
    assert t5.decoder_sizes.num_kv_heads == 1


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_require_only_their_documented_macros(path):
    mode, required = EXAMPLE_RUNS[path.stem.split("_")[-1]]
    configuration.parse([f"gin/examples/{path.name}"], required)
    bound = arguments(mode)
    if bound.get("model") is not None:
        assert parameter_count(bound["model"]) < 5e6


def test_macros_select_search_sampling_or_candidates():
    files = [f"gin/{name}.gin" for name in ("sizes/tiny", "models/fid", "runs/eval")]
    drawn = ["SAMPLING_TEMPERATURE = 0.7", "TOP_K = 5", "TOP_P = 0.9", "CANDIDATES = ['yes', 'no']"]
    configuration.parse(files, [*RUNS["eval"][1], *drawn])
    bound = arguments("eval")
    assert bound["model"].decode == DecodeConfig(temperature=0.7, top_k=5, top_p=0.9)
    assert bound["candidates"] == ["yes", "no"]


def test_changes_of_the_checkpoints_model_need_no_model():
    changes = ["NUM_KEPT = None", "MEMORY_CODEC = 'int8'", "BEAM_SIZE = 4", "VOCABULARY = 'v'"]
    configuration.parse(["gin/runs/eval.gin"], [*RUNS["eval"][1], *changes])
    bound = arguments("eval")
    assert (bound["num_kept"], bound["memory_codec"], bound["vocabulary"]) == (None, "int8", "v")
    assert bound["decode"].beams == 4


@pytest.mark.parametrize("run", ["retrieve", "infer", "serve"])
def test_every_mode_that_retrieves_takes_the_same_macros(run):
    given = ["RETRIEVER = 'hybrid'", "ENCODER_DIR = 'e'", "INDEX_DIR = 'i'", "DENSE_WEIGHT = 0.3"]
    configuration.parse([f"gin/runs/{run}.gin"], [*RUNS[run][1], *given, "BM25_K1 = 0.9"])
    retriever = arguments(run)["retriever"]
    assert (retriever.method, retriever.dense_weight, retriever.bm25.k1) == ("hybrid", 0.3, 0.9)
    assert (retriever.dense.encoder_dir, retriever.dense.index_dir) == ("e", "i")


def test_memory_takes_a_model_after_its_own_file():
    configuration.parse(["gin/runs/memory.gin"], RUNS["memory"][1])
    assert plan_model() is None
    files = ["gin/runs/memory.gin", "gin/sizes/tiny.gin", "gin/models/lumen.gin"]
    configuration.parse(files, RUNS["memory"][1])
    assert isinstance(plan_model(), GlimmerModel)


def plan_model():
    return gin.get_bindings("glimmer_jax.modes.memory.plan")["model"]


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_ablations_change_one_thing(path):
    required = EXAMPLE_RUNS["train"][1]
    example = "gin/examples/pydocs_glimmer_train.gin"
    configuration.parse([example], required)
    before = described(arguments("train"))
    configuration.parse([example, f"gin/ablations/{path.name}"], required)
    after = described(arguments("train"))
    changed = {name for name in before if before[name] != after[name]}
    # A change of alpha moves both cuts.
    assert changed and len(changed) <= (2 if path.stem == "alpha" else 1), changed
    if path.stem == "k":
        lengths = [ast.literal_eval(found["task_feature_lengths"]) for found in (before, after)]
        assert [one.pop("passages") for one in lengths] == [(10, 120), (4, 120)]
        assert lengths[0] == lengths[1]


def described(bound):
    model = bound.pop("model")
    # Their fields stand beside them.
    groups = (DatasetConfig, CorpusConfig)
    found = {k: repr(v) for k, v in bound.items() if not isinstance(v, groups)}
    for config in (model.config, model.loss, model.decode):
        found |= {f"{type(config).__name__}.{k}": repr(v) for k, v in vars(config).items()}
    return found


def test_a_misspelt_macro_is_an_error_with_a_suggestion():
    files = ["gin/runs/score.gin"]
    bindings = [*RUNS["score"][1], "OUTPUT_PAHT = 'o'"]
    with pytest.raises(ValueError, match=r"OUTPUT_PAHT is set.*did you mean OUTPUT_PATH\?"):
        configuration.parse(files, bindings)


@pytest.mark.parametrize(("old", "new"), configuration.RENAMED.items())
def test_renamed_macros_are_errors_that_name_the_new_one(old, new):
    run = "infer" if old in ("OUTPUT_PATH", "SEED") else "eval"
    run = "finetune" if old in ("EVAL_EVERY", "MATCHING_START") else run
    files = ["gin/sizes/tiny.gin", "gin/models/glimmer.gin", f"gin/runs/{run}.gin"]
    with pytest.raises(configuration.ConfigError, match=rf"\b{old} is set.*\b{new}\?"):
        configuration.parse(files, [*RUNS[run][1], f"{old} = 1"])


@pytest.mark.parametrize(
    ("binding", "facts"),
    [
        ("BATCH_SIZE = 3.5", r"BATCH_SIZE must be int, got 3\.5.*--gin\.BATCH_SIZE=8"),
        ("TRAIN_STEPS = 'ten'", r"TRAIN_STEPS must be int, got 'ten'.*--gin\.TRAIN_STEPS=8"),
        ("LEARNING_RATE = 'fast'", r"LEARNING_RATE must be float, got 'fast'.*LEARNING_RATE=0\.1"),
        ("USE_CACHED_TASKS = 1", r"USE_CACHED_TASKS must be bool, got 1"),
        ("MODEL_DIR = 3", r"MODEL_DIR must be str, got 3.*--gin\.MODEL_DIR=\"'text'\""),
        ("BATCH_SIZE = abc", r"BATCH_SIZE=abc.*--gin\.BATCH_SIZE=\"'abc'\""),
        ("PASSAGES_DIR = /data/p", r"PASSAGES_DIR=/data/p.*--gin\.PASSAGES_DIR=\"'/data/p'\""),
        ("t5.T5Config.emb_dim = 'x'", r"T5Config\.emb_dim must be int, got 'x'"),
    ],
)
def test_values_of_a_wrong_type_report_the_macro(binding, facts):
    files = ["gin/sizes/tiny.gin", "gin/models/glimmer.gin", "gin/runs/finetune.gin"]
    with pytest.raises(configuration.ConfigError, match=facts):
        configuration.parse(files, [*RUNS["finetune"][1], binding])


def test_items_of_a_list_have_their_type():
    files, macros = ["gin/runs/serve.gin"], RUNS["serve"][1]
    configuration.parse(files, [*macros, "KEPT_CHOICES = (2, 3)"])
    with pytest.raises(configuration.ConfigError, match=r"KEPT_CHOICES must be list of int.*'2'"):
        configuration.parse(files, [*macros, "KEPT_CHOICES = ('2',)"])


def test_messages_about_parameters_name_their_macros():
    files = ["gin/sizes/tiny.gin", "gin/models/glimmer.gin", "gin/runs/eval.gin"]
    configuration.parse(files, RUNS["eval"][1])
    named = {
        "beams must be at least 1, got 0.": "BEAM_SIZE",
        "memory_codec must be one of bf16, int8.": "MEMORY_CODEC",
        "top_k=5 and top_p=1.0 only apply to sampling.": "TOP_K, TOP_P",
    }
    for message, macros in named.items():
        assert macros in configuration.name_macros(message).removeprefix(message)
    for message in ("NUM_KEPT: num_kept must be at least 1.", "Give --num_kept=1, it must rerank."):
        assert configuration.name_macros(message) == message


def test_the_current_folder_cannot_replace_a_shipped_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/score.gin", "mesh.gin"):
        path = tmp_path / "gin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("REPLACED = 1\n")
    (tmp_path / "mine.gin").write_text('include "gin/runs/score.gin"\n')
    for files in (["gin/runs/score.gin"], ["mine.gin"]):
        configuration.parse(files, RUNS["score"][1])
    with pytest.raises(configuration.ConfigError, match="REPLACED"):
        configuration.parse(["./gin/runs/score.gin"], [])


def test_private_names_are_those_of_the_pinned_gin():
    # For another version, check `_bindings` and `_search_in` in configuration.py first.
    assert importlib.metadata.version("gin-config") == "0.5.0"
    source = pathlib.Path(configuration.__file__).read_text()
    assert set(re.findall(r"gin_config\.(_\w+)", source)) == {"_CONFIG", "_LOCATION_PREFIXES"}


def test_macros_without_value_are_reported():
    with pytest.raises(ValueError, match=r"No value for QUESTIONS.*--gin\.QUESTIONS="):
        configuration.parse(["gin/runs/score.gin"], ["PREDICTIONS = 'p'"])
    with pytest.raises(ValueError, match="No value for.* TASK_FEATURE_LENGTHS,"):
        configuration.parse(["gin/sizes/tiny.gin", "gin/models/fid.gin", "gin/runs/finetune.gin"])


@pytest.mark.parametrize(
    ("files", "bindings", "message"),
    [
        (["gin/runs/typo.gin"], [], r"gin/runs/typo\.gin"),
        (["gin/runs/score.gin"], ["QUESTIONS = oops"], "QUESTIONS=oops"),
        (["gin/runs/score.gin"], ["score.score.typo = 1"], "typo"),
    ],
)
def test_gin_errors_are_reported_in_one_line(files, bindings, message):
    with pytest.raises(configuration.ConfigError, match=message) as caught:
        configuration.parse(files, bindings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"include 'mine.gin'\n", "includes itself"),
        (b"X = " + b"[" * 5000, "nested too deeply"),
        (b"X = [1,\n", "EOF in multi-line"),
        (b"X = '''abc\n", "EOF in multi-line"),
        (b"X = " + b"9" * 5000, "5000 digits"),
        (b"\xff\xfe", "codec can't decode"),
        (b"X = 1\0", "mine.gin, line 1"),
        (
            b"include 'gin/runs/score.gin'\nPREDICTIONS = 'p'\nQUESTIONS = 'a\\0'",
            "QUESTIONS holds NUL",
        ),
        (
            b"include 'gin/runs/score.gin'\nQUESTIONS = 'q'\nPREDICTIONS = '\\ud800'",
            "PREDICTIONS holds",
        ),
    ],
)
def test_hostile_gin_files_are_reported_in_one_line(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.gin").write_bytes(content)
    with pytest.raises(configuration.ConfigError, match=message) as caught:
        configuration.parse(["mine.gin"])
    assert "\n" not in str(caught.value)


def test_a_mode_that_no_file_configures_is_reported():
    configuration.parse(["gin/sizes/tiny.gin"], ["NUM_ENCODER_LAYERS = 6"])
    with pytest.raises(ValueError, match=r"glimmer_jax\.modes\.score\.score"):
        arguments("score")


def test_a_size_without_a_model_is_reported():
    given = ["CHECKPOINT_PATH = 'x'", "PASSAGES_DIR = 'y'"]
    configuration.parse(["gin/runs/infer.gin", "gin/sizes/tiny.gin"], given)
    with pytest.raises(ValueError, match=r"T5Config.*nothing uses it.*gin/models"):
        arguments("infer")
    files = ["gin/runs/infer.gin", "gin/sizes/tiny.gin", "gin/models/glimmer.gin"]
    configuration.parse(files, given)
    assert arguments("infer")


def test_errors_keep_their_number_and_their_cause(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError(errno.ESTALE, "stale") from ConnectionResetError(104, "by peer")

    monkeypatch.setattr("glimmer_jax.modes.memory.checks.required", unreachable)
    configuration.parse(["gin/runs/memory.gin"], ["MEMORY_DIR = 'x'", "ACTION = 'inspect'"])
    from glimmer_jax.modes import memory

    with pytest.raises(OSError, match="stale") as caught:
        configuration.configured(memory.memory)()
    assert caught.value.errno == errno.ESTALE
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    assert storage_errors.classify_error(caught.value) == "temporary"
