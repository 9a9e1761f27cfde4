"""A miniature of KILT through all steps: passages, retrieval, training, memory, answers, scores."""

import json
import os

import gin
import pytest

from glimmer_jax import main as command_line
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.shipped import CHECKPOINTS
from glimmer_jax.storage.json_lines import read_json_lines
from tests import mini_kilt

pytest.importorskip("seqio")

TINY = {
    "NUM_ENCODER_LAYERS": 3,
    "t5.T5Config.num_decoder_layers": 1,
    "t5.T5Config.emb_dim": 8,
    "t5.T5Config.num_heads": 2,
    "t5.T5Config.head_dim": 4,
    "t5.T5Config.mlp_dim": 16,
    "NUM_KEPT": 2,
}
GLIMMER = ("sizes/tiny", "models/glimmer")
LENGTHS = {"inputs": 64, "targets": 32, "passages": (3, 32)}
SIX = ("nq", "triviaqa", "hotpotqa", "fever", "structured_zeroshot", "trex")

SHIPPED = str(CHECKPOINTS / "pydocs_glimmer.safetensors")


@pytest.fixture(scope="module", autouse=True)
def clear():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    gin.clear_config()


def run(mode, *files, **macros):
    arguments = [f"--run_mode={mode}", *(f"--gin_file=gin/{file}.gin" for file in files)]
    return command_line.main([*arguments, *(f"--gin.{k}={v!r}" for k, v in macros.items())])


def lines(path):
    return [line for _, line in read_json_lines(path)]


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """The miniature with its passages, and retrieved files of all tasks."""
    folder = tmp_path_factory.mktemp("kilt")
    mini_kilt.write(folder)
    assert cut(folder / "kilt_knowledgesource.json", folder / "passages") == 0
    assert retrieve(folder, "*-kilt.jsonl", folder / "retrieved") == 0
    return folder


def cut(corpus, passages, **macros):
    given = {"CORPUS": str(corpus), "CORPUS_FORMAT": "kilt", "PASSAGES_DIR": str(passages)}
    given |= {"PASSAGE_WORDS": mini_kilt.PASSAGE_WORDS, "VOCABULARY": "pydocs"}
    return run("passages", "runs/passages", **given, **macros)


def records(folder):
    """The passages by their ids."""
    return {one["id"]: one for one in Passages.open(folder / "passages").records()}


def retrieve(folder, pattern, data_dir, **macros):
    given = {
        "PASSAGES_DIR": str(folder / "passages"),
        "QUESTIONS": str(folder / "questions" / pattern),
        "TRIVIAQA": str(folder / "triviaqa" / "*.json"),
        "DATA_DIR": str(data_dir),
        "NUM_PASSAGES": 3,
        "QUESTION_WORDS": 12,
    }
    return run("retrieve", "runs/retrieve", **{**given, **macros})


def test_every_paragraph_of_the_knowledge_source_is_a_passage(mini):
    found = [(one["title"], one["paragraphs"]) for one in records(mini).values()]
    assert found == [(town, [n, n]) for town in mini_kilt.TOWNS for n in (1, 3, 4)]


def test_published_files_become_retrieved_ones(mini):
    found = {path.name: lines(path) for path in (mini / "retrieved").glob("*.jsonl")}
    tasks = {name.rpartition("-")[0] for name in found}
    assert tasks == set(mini_kilt.TASKS) and len(found) == 31
    for name, examples in found.items():
        assert len(examples) == 6
        assert all(example["input"] and len(example["retrieved"]) == 3 for example in examples)
        if not name.endswith("-test.jsonl"):
            golds = [any(one["gold"] for one in example["retrieved"]) for example in examples]
            assert all(golds), name
    assert found["triviaqa-test.jsonl"][1]["input"] == "Which town makes salt fish?"
    assert found["fever-dev.jsonl"][0]["id"] == "100"
    mention = found["cweb-dev.jsonl"][2]["input"].split()
    assert len(mention) == 12 and "[START_ENT] Quenlow [END_ENT]" in " ".join(mention)
    # Evidence that KILT did not find in its page covers the entire page; other evidence a
    # paragraph.
    known, retrieved = records(mini), found["hotpotqa-dev.jsonl"][0]["retrieved"]
    marks = [one["gold"] for one in retrieved if known[one["id"]]["page"] == "7000"]
    assert marks and all(marks)
    assert [one["gold"] for one in found["nq-dev.jsonl"][0]["retrieved"]].count(True) <= 2


def test_from_training_to_scores_of_a_submission(mini, tmp_path, capsys):
    model_dir, memory = str(tmp_path / "run"), str(tmp_path / "memory")
    data = {"PASSAGES_DIR": str(mini / "passages"), "DATA_DIR": str(mini / "retrieved")}
    training = {"MODEL_DIR": model_dir, "TRAIN_STEPS": 4, "BATCH_SIZE": 8, "LOG_EVERY": 1}
    training |= {"EVAL_PERIOD": 0, "BEST_METRIC": None, "SUPERVISED_WEIGHT": 1.0}
    sized = {**TINY, "TASK_FEATURE_LENGTHS": LENGTHS}
    training["VOCABULARY"] = "pydocs"
    assert run("train", *GLIMMER, "runs/finetune", "data/kilt", **training, **data, **sized) == 0
    shared = {"CHECKPOINT_PATH": model_dir, "PASSAGES_DIR": data["PASSAGES_DIR"]}
    building = {**shared, "MEMORY_DIR": memory, "MAX_PASSAGE_TOKENS": 32, "BATCH_SIZE": 2}
    assert run("build_memory", *GLIMMER, "runs/build_memory", **building, **TINY) == 0

    evaluating = {
        "MEMORY_DIR": memory,
        "DATA_DIR": data["DATA_DIR"],
        "MIXTURE_OR_TASK_SPLIT": "validation",
    }
    evaluating |= {"EVAL_OUTPUT_DIR": str(tmp_path / "eval"), "BATCH_SIZE": 8}
    assert run("eval", *GLIMMER, "runs/eval", "data/kilt", **shared, **evaluating, **sized) == 0
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    for task in SIX:
        right = "exact_match" if task in ("nq", "triviaqa", "hotpotqa") else "accuracy"
        assert 0 <= metrics[f"kilt_{task}/{right}"] <= 1
        assert metrics[f"kilt_{task}/recall_kept"] > 0

    answers = tmp_path / "guess" / "predictions-hotpotqa-dev.jsonl"
    questions = tmp_path / "hotpotqa-dev.jsonl"
    asked = lines(mini / "retrieved" / "hotpotqa-dev.jsonl")
    long = {**asked[0], "id": "long", "input": "Which river, and which " + "other river " * 40}
    mini_kilt.write_lines(questions, [*asked, long])
    asking = {
        "MEMORY_DIR": memory,
        "QUESTIONS": str(questions),
        "INFER_OUTPUT_DIR": str(answers.parent),
    }
    capsys.readouterr()
    assert run("infer", *GLIMMER, "runs/infer", **shared, **asking, **sized) == 0
    assert "1 questions are longer than 64 tokens" in capsys.readouterr().out
    predicted = lines(tmp_path / "eval" / "predictions-kilt_hotpotqa.jsonl")
    given = {record["id"]: record for record in lines(answers)}
    for one in predicted:
        other = given[one["id"]]
        # seqio puts no space behind a sentinel, of which untrained answers are full.
        texts = (one["prediction"], other["output"][0]["answer"])
        assert len({"".join(text.split()) for text in texts}) == 1
        assert other["score"] == pytest.approx(one["score"], abs=1e-3)
        assert [p["id"] for p in other["passages"]] == one["passage_ids"]
    known = records(mini)
    for record, retrieved in zip(lines(answers), lines(questions), strict=True):
        scores = [one["score"] for one in record["passages"]]
        assert scores == sorted(scores, reverse=True)
        best = list(dict.fromkeys(known[one["id"]]["page"] for one in record["passages"]))
        pages = [one["wikipedia_id"] for one in record["output"][0]["provenance"]]
        assert pages == best and record["id"] == retrieved["id"]
    gold = mini / "questions" / "hotpotqa-dev-kilt.jsonl"
    capsys.readouterr()
    flags = ["--run_mode=score", f"--gold={gold}", f"--guess={answers}"]
    assert command_line.main(flags) == 0
    official = json.loads(capsys.readouterr().out)
    evaluated = metrics["kilt_hotpotqa/exact_match"]
    assert official["downstream"]["downstream"]["em"] == pytest.approx(evaluated)
    assert official["retrieval"]["recall@5"] > 0

    capsys.readouterr()
    assert run("infer", *GLIMMER, "runs/infer", **shared, **asking, **sized) == 2
    assert "OVERWRITE=True" in capsys.readouterr().err
    asking["OVERWRITE"] = True

    # A passage that the memory has forgotten.
    gone = lines(questions)[0]["retrieved"][0]["id"]
    forgetting = {"MEMORY_DIR": memory, "ACTION": "withdraw", "IDS": [gone]}
    assert run("memory", "runs/memory", **forgetting) == 0
    assert run("infer", *GLIMMER, "runs/infer", **shared, **asking, **sized) == 2
    assert "(1 of them withdrawn)" in capsys.readouterr().err
    masked = {**asking, "UNKNOWN_PASSAGES": "mask"}
    assert run("infer", *GLIMMER, "runs/infer", **shared, **masked, **sized) == 0
    assert "missing from the memory" in capsys.readouterr().out
    assert gone not in [p["id"] for one in lines(answers) for p in one["passages"]]
    evaluating["UNKNOWN_PASSAGES"] = "mask"
    assert run("eval", *GLIMMER, "runs/eval", "data/kilt", **shared, **evaluating, **sized) == 2
    assert "UNKNOWN_PASSAGES: 'error' -> 'mask'" in capsys.readouterr().err
    evaluating["OVERWRITE"] = True
    assert run("eval", *GLIMMER, "runs/eval", "data/kilt", **shared, **evaluating, **sized) == 0
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["passages_not_in_memory"] > 0
    predicted = lines(tmp_path / "eval" / "predictions-kilt_hotpotqa.jsonl")
    assert gone not in [i for one in predicted for i in one["passage_ids"]]

    # The same texts, cut elsewhere: not what the memory was made from.
    short = str(tmp_path / "short")
    assert cut(mini / "kilt_knowledgesource.json", short, MAX_PASSAGE_TOKENS=20) == 0
    other = {"CHECKPOINT_PATH": model_dir, **evaluating, **sized, "PASSAGES_DIR": short}
    assert run("eval", *GLIMMER, "runs/eval", "data/kilt", **other) == 2
    error = capsys.readouterr().err
    assert memory in error and "the same id may have another text" in error


def test_a_corpus_other_than_that_of_the_files_is_rejected(mini, tmp_path, capfd):
    other = str(tmp_path / "other")
    corpus = tmp_path / "corpus.json"
    mini_kilt.write_lines(corpus, [{**one, "text": ["x"]} for one in mini_kilt.pages()])
    assert cut(corpus, other) == 0
    given = {"PASSAGES_DIR": other, "TASK_FEATURE_LENGTHS": LENGTHS, **TINY}
    data_dir = str(mini / "retrieved")
    evaluating = {"CHECKPOINT_PATH": SHIPPED, "DATA_DIR": data_dir}
    assert run("eval", *GLIMMER, "runs/eval", "data/kilt", **evaluating, **given) == 2
    assert "holds another corpus" in capfd.readouterr().err
    training = {"MODEL_DIR": str(tmp_path / "run"), "TRAIN_STEPS": 1, "BATCH_SIZE": 8}
    training |= {"DATA_DIR": data_dir, "VOCABULARY": "pydocs"}
    assert run("train", *GLIMMER, "runs/finetune", "data/kilt", **training, **given) == 2
    assert "holds another corpus" in capfd.readouterr().err


def test_missing_questions_and_labels_are_reported(mini, tmp_path, capfd):
    assert retrieve(mini, "triviaqa-*", tmp_path / "out", TRIVIAQA=None) == 2
    assert (
        "has no question in `input`. KILT's TriviaQA files hold only ids" in capfd.readouterr().err
    )
    assert retrieve(mini, "typo*", tmp_path / "out") == 2
    assert "QUESTIONS: no file matches" in capfd.readouterr().err
    given = {"CHECKPOINT_PATH": SHIPPED, "PASSAGES_DIR": str(mini / "passages"), **TINY}
    twice = tmp_path / "twice.jsonl"
    text = (mini / "retrieved" / "nq-test.jsonl").read_text()
    twice.write_text(text + text)
    asking = {"QUESTIONS": str(twice), "INFER_OUTPUT_DIR": "o", "TASK_FEATURE_LENGTHS": LENGTHS}
    assert run("infer", *GLIMMER, "runs/infer", **given, **asking) == 2
    assert "twice.jsonl:7: the id 'nq_test_0' is a duplicate" in capfd.readouterr().err
    asking["QUESTIONS"] = str(mini / "questions" / "triviaqa-test_id_without_answers-kilt.jsonl")
    assert run("infer", *GLIMMER, "runs/infer", **given, **asking) == 2
    assert "has no question in `input`" in capfd.readouterr().err
