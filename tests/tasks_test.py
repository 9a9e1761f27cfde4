"""seqio side: tasks over retrieved files, feature converter, batches, evaluation."""

import functools
import hashlib
import json
import os

import numpy as np
import pytest

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.corpus.passages_writer import write_passages

seqio = pytest.importorskip("seqio")
import tensorflow as tf

from glimmer_jax import axes as lengths_module
from glimmer_jax.data import cache, evaluation, features, pipeline, preprocessors, retrieved_tasks
from glimmer_jax.data.features import GlimmerFeatureConverter
from glimmer_jax.data.fit import check_fit
from glimmer_jax.metrics import reranking
from glimmer_jax.modes import early
from glimmer_jax.modes.cache import cache_tasks
from glimmer_jax.vocabulary import Vocabulary
from tests.vocabularies import SPECIAL_IDS, train_sentencepiece

LENGTHS = {"inputs": 8, "targets": 6, "passages": (3, 12)}
TASK = "which_test"


def line(number, passages=3, answers=("json.dumps", "dumps"), bleu=1.0):
    return {
        "id": f"q{number}",
        "input": f"words {number}",
        "output": [
            {"answer": answer, "provenance": [{"wikipedia_id": "x", "bleu_score": bleu}]}
            for answer in answers
        ],
        "meta": {},
        "retrieved": [
            {"id": 10 + (number + i) % 4, "score": 3.0 - i, "gold": i == 1} for i in range(passages)
        ],
    }


def write_lines(folder, lines, split="train"):
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(one) + "\n" for one in lines)
    (folder / f"which-{split}.jsonl").write_text(text)


def first_answer_is_right(targets, predictions):
    hits = [p in t for t, p in zip(targets, predictions, strict=True)]
    return {"exact_match": 100 * float(np.mean(hits))}


def first_passage_is_gold(targets, predictions, aux_values):
    return {"recall": float(np.mean(aux_values["first"] == 1))}


@pytest.fixture(scope="module", autouse=True)
def task():
    retrieved_tasks.register(TASK, "which", [first_answer_is_right, first_passage_is_gold])
    yield
    seqio.TaskRegistry.remove(TASK)


@pytest.fixture
def data_dir(tmp_path):
    retrieved_tasks.configure(tmp_path / "retrieved")
    write_lines(tmp_path / "retrieved", [line(i, passages=i % 4) for i in range(10)])
    write_lines(tmp_path / "retrieved", [line(i) for i in range(5)], "dev")
    yield tmp_path / "retrieved"
    retrieved_tasks.configure()


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    vocabulary = Vocabulary("pydocs")
    folder = tmp_path_factory.mktemp("corpus") / "passages"
    records = [{"id": 10 + i, "title": f"t{i}", "text": "some text " * (i + 1)} for i in range(4)]
    write_passages(
        folder,
        records,
        vocabulary.encode,
        vocabulary.fingerprint,
        16,
        vocab_size=vocabulary.vocab_size,
        source="test",
    )
    return Passages.open(folder)


def convert(example, lengths=LENGTHS):
    ds = tf.data.Dataset.from_tensors({k: tf.constant(v) for k, v in example.items()})
    return next(features.GlimmerFeatureConverter()(ds, lengths).as_numpy_iterator())


def test_converter_aligns_questions_right_and_shifts_targets():
    example = {
        "inputs": np.array([7, 8], np.int32),
        "targets": np.array([9, 1], np.int32),
        "passage_ids": np.array([81], np.int64),
    }
    got = convert(example, {"inputs": 4, "targets": 3, "passages": (2, 5)})
    assert {name: x.tolist() for name, x in got.items()} == {
        "question_tokens": [0, 0, 7, 8],
        "decoder_input_tokens": [0, 9, 1],
        "decoder_target_tokens": [9, 1, 0],
        "decoder_loss_weights": [1.0, 1.0, 0.0],
        "passage_ids": [81, -1],
    }
    assert got["passage_ids"].dtype == np.int64


def test_converter_takes_inline_passages_of_more_passages_than_tokens():
    example = {
        "inputs": np.array([7], np.int32),
        "targets": np.array([1], np.int32),
        "passages": np.array([[5, 6, 1], [4, 1, 0]], np.int32),
        "gold_passages": np.array([0, 1], np.int32),
    }
    got = convert(example, {"inputs": 2, "targets": 2, "passages": (3, 2)})
    assert got["passage_tokens"].tolist() == [[5, 6], [4, 1], [0, 0]]
    assert got["gold_passages"].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "lengths",
    [
        {"inputs": 8, "targets": 6},
        {"inputs": 8, "targets": 6, "passages": 3},
        {"inputs": 8, "targets": 0, "passages": (3, 12)},
        {"inputs": 8, "targets": 6, "passages": (3, 12.5)},
        {"inputs": True, "targets": 6, "passages": (3, 12)},
        {"inputs": 8, "targets": 6, "passages": (2**40, 12)},
    ],
)
def test_invalid_lengths_are_rejected(lengths):
    with pytest.raises(ValueError, match=r"TASK_FEATURE_LENGTHS must be .*; got"):
        lengths_module.check_lengths(lengths)


def test_the_converter_rejects_packing_and_missing_passages():
    with pytest.raises(ValueError, match="cannot pack"):
        features.GlimmerFeatureConverter(pack=True)
    tokens = np.array([7], np.int32)
    with pytest.raises(ValueError, match="either `passage_ids` or `passages`"):
        convert({"inputs": tokens, "targets": tokens})


def test_lines_become_features():
    assert preprocessors.example_features(line(0, passages=2)) == {
        "id": "q0",
        "question": "words 0",
        "answers": ["json.dumps", "dumps"],
        "passage_ids": [10, 11],
        "gold_passages": [0, 1],
    }
    with pytest.raises(ValueError, match="'q' has no `retrieved`.*run_mode=retrieve"):
        preprocessors.example_features({"id": "q", "input": "?", "output": []})


def test_training_answers_need_sound_provenance():
    poor = line(0, answers=("poor",), bleu=0.2)
    assert preprocessors.example_features(poor, min_bleu=0.5) is None
    assert preprocessors.example_features(poor)["answers"] == ["poor"]
    absent = {name: value for name, value in poor.items() if name != "output"}
    assert preprocessors.example_features(absent, min_bleu=0.5) is None
    mixed = {**poor, "output": poor["output"] + line(0, answers=("good",))["output"]}
    assert preprocessors.example_features(mixed, min_bleu=0.5)["answers"] == ["good"]
    unscored = {**poor, "output": [{"answer": "trusted", "provenance": [{"wikipedia_id": "x"}]}]}
    assert preprocessors.example_features(unscored, min_bleu=0.5)["answers"] == ["trusted"]
    # The hub writes -1.0 for none, KILT null.
    unscored["output"][0]["provenance"] = [{"wikipedia_id": "x", "bleu_score": -1.0}]
    assert preprocessors.example_features(unscored, min_bleu=0.5)["answers"] == ["trusted"]
    unscored["output"][0]["provenance"] = [{"wikipedia_id": "x", "bleu_score": None}]
    assert preprocessors.example_features(unscored, min_bleu=0.5)["answers"] == ["trusted"]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_batches_are_deterministic_resumable_and_differ_per_epoch(data_dir, passages):
    def train(start_step=0, **kwargs):
        return pipeline.batches(
            TASK, "train", LENGTHS, 4, seed=3, start_step=start_step, passages=passages, **kwargs
        )

    whole = take(train(), 10)
    assert_same(whole, take(train(), 10))
    assert_same(whole[7:], take(train(7), 3))
    first = take(train(own_rows=np.array([0, 1])), 2)
    second = take(train(own_rows=np.array([2, 3])), 2)
    joined = [
        {name: np.concatenate([a[name], b[name]]) for name in a}
        for a, b in zip(first, second, strict=True)
    ]
    assert_same(whole[:2], joined)
    batch = whole[0]
    assert batch["passage_tokens"].shape == (4, 3, 12)
    np.testing.assert_array_equal(batch["passage_tokens"].any(-1), batch["passage_ids"] >= 0)
    vocabulary = Vocabulary("pydocs")
    answers = {vocabulary.decode(row) for one in whole for row in one["decoder_target_tokens"]}
    assert answers == {"json.dumps", "dumps"}
    questions = {vocabulary.decode(row[row > 0]) for one in whole for row in one["question_tokens"]}
    assert questions == {f"question: words {i}" for i in range(10)}


def test_an_incomplete_batch_is_filled_up_with_empty_rows(data_dir):
    ds = seqio.get_dataset(TASK, LENGTHS, GlimmerFeatureConverter(), "validation", shuffle=False)
    (*_, last) = ds.batch(4).as_numpy_iterator()
    assert len(last["question_tokens"]) == 1 and last["passage_ids"][0].tolist() == [10, 11, 12]
    filled = pipeline.fill(last, 4)
    assert not filled["decoder_loss_weights"][1:].any()
    assert (filled["passage_ids"][1:] == -1).all()
    assert_same([last], [{name: x[:1] for name, x in filled.items()}])


def test_a_second_epoch_draws_other_answers(data_dir):
    write_lines(data_dir, [line(0, answers=tuple("abcdefgh"))])
    rows = take(pipeline.batches(TASK, "train", LENGTHS, 1), 20)
    assert len({tuple(row["decoder_target_tokens"][0]) for row in rows}) > 3


def test_bad_data_ends_before_anything_is_computed(data_dir, passages):
    with pytest.raises(ValueError, match="MIXTURE_OR_TASK_NAME.*'typo'"):
        pipeline.batches("typo", "train", LENGTHS, 4)
    with pytest.raises(ValueError, match=r"DATA_DIR.*which-test\.jsonl.*run_mode=retrieve"):
        pipeline.batches(TASK, "test", LENGTHS, 4)
    with pytest.raises(ValueError, match="train, validation, test; got 'dev'"):
        retrieved_tasks.retrieved_file("which", "dev")
    with pytest.raises(ValueError, match="BATCH_SIZE must be at least 1, got 0"):
        pipeline.batches(TASK, "train", LENGTHS, 0)
    (data_dir / "which-train.jsonl").write_text('{"id": "a"\n')
    with pytest.raises(ValueError, match=r"which-train\.jsonl:1: not a JSON object"):
        pipeline.batches(TASK, "train", LENGTHS, 4)
    write_lines(data_dir, [line(0, bleu=0.1)])
    with pytest.raises(ValueError, match="All 1 examples .* below MIN_BLEU_SCORE=0.5"):
        pipeline.batches(TASK, "train", LENGTHS, 4)
    with pytest.raises(ValueError, match=r"MIXTURE_OR_TASK_MODULE.*'tasks\.typo'"):
        pipeline.import_tasks("tasks.typo")


def test_fit_is_checked_before_training(data_dir):
    fit = functools.partial(check_fit, vocabulary=Vocabulary("pydocs"), has_passages=True)
    counts = fit(TASK, "validation", LENGTHS)
    assert counts.pop("examples") == 5 and len(counts) == 6 and not any(counts.values())
    too_many = {**LENGTHS, "passages": (4, 12)}
    with pytest.raises(ValueError, match="has K=4 .* at most 3"):
        fit(TASK, "validation", too_many)
    with pytest.raises(ValueError, match=r"'inputs'\]=2, but 5 of 5 questions"):
        fit(TASK, "validation", {**LENGTHS, "inputs": 2})
    with pytest.raises(ValueError, match=r"'targets'\]=1, but 5 of 5 answers"):
        fit(TASK, "validation", {**LENGTHS, "targets": 1})
    with pytest.raises(ValueError, match="PASSAGES_DIR and MEMORY_DIR"):
        fit(TASK, "validation", LENGTHS, has_passages=False)
    with pytest.raises(ValueError, match="VOCABULARY.*inputs of which_test"):
        fit(TASK, "validation", LENGTHS, vocabulary=Vocabulary("pydocs", extra_ids=3))
    # A copy of the file is the same vocabulary.
    copy = data_dir.parent / "copy.model"
    copy.write_bytes(Vocabulary("pydocs").path.read_bytes())
    assert fit(TASK, "validation", LENGTHS, vocabulary=Vocabulary(copy))["examples"] == 5


def test_truncated_evaluation_data_is_counted_and_logged_as_a_warning(data_dir, caplog):
    fit = functools.partial(check_fit, TASK, vocabulary=Vocabulary("pydocs"), has_passages=True)
    long = {**line(0), "input": " ".join("words" for _ in range(30))}
    for split, file in (("train", "train"), ("validation", "dev")):
        write_lines(data_dir, [*(line(i + 1) for i in range(20)), long], file)
        caplog.clear()
        # As in evaluation, every example is checked.
        assert fit(split, LENGTHS, examples=None)["questions_cut"] == 1
        if split == "train":
            assert not caplog.records
            continue
        (warning,) = (record.getMessage() for record in caplog.records)
        for fact in ("1 of 21 questions", TASK, split, "8 tokens", "'inputs'"):
            assert fact in warning
        assert fit(split, LENGTHS, examples=20)["questions_cut"] == 0


def test_unknown_tokens_are_counted_and_above_one_percent_a_warning(data_dir, caplog):
    path = data_dir.parent / "characters.model"
    sentences = ["question: words answer 0123456789"]
    train_sentencepiece(path, sentences, model_type="char", vocab_size=40, **SPECIAL_IDS)
    vocabulary = Vocabulary(path)
    retrieved_tasks.configure(data_dir, vocabulary=vocabulary)
    retrieved_tasks.register("characters", "which", [])
    lengths = {**LENGTHS, "inputs": 40, "targets": 20}
    unknown = {**line(0), "input": "\u0939 word \u0939", "output": [{"answer": "\u0939"}]}
    for count, warned in ((400, []), (5, ["questions", "answers"])):
        caplog.clear()
        write_lines(data_dir, [*(line(i + 1, answers=["words"]) for i in range(count)), unknown])
        fit = check_fit("characters", "train", lengths, vocabulary=vocabulary, has_passages=True)
        assert fit["unknown_tokens"] == 3
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == len(warned)
        for message, texts in zip(messages, warned, strict=True):
            for fact in ("VOCABULARY", texts, "characters", "train", str(path)):
                assert fact in message
    seqio.TaskRegistry.remove("characters")


def test_missing_splits_and_labels_are_reported(data_dir):
    write_lines(data_dir, [{**line(0), "output": []}], "test")
    with pytest.raises(ValueError, match="no test example .*run_mode=infer"):
        check_fit(TASK, "test", LENGTHS, vocabulary=Vocabulary("pydocs"), has_passages=True)
    with pytest.raises(ValueError, match="no other examples.*train, validation, test"):
        check_fit(TASK, "other", LENGTHS, vocabulary=Vocabulary("pydocs"), has_passages=True)


def test_the_relevance_filter_is_a_setting_of_the_process(data_dir, caplog):
    write_lines(data_dir, [line(i, bleu=i / 10) for i in range(10)])
    read = seqio.get_mixture_or_task(TASK).get_dataset
    with caplog.at_level("INFO"):
        assert len(list(read(None, "train", shuffle=False))) == 5
    assert "5 of 10 examples are dropped" in caplog.text
    retrieved_tasks.configure(data_dir, min_bleu_score=0.0)
    assert len(list(read(None, "train", shuffle=False))) == 10
    for wrong in (1.5, "half", True):
        with pytest.raises(ValueError, match=f"MIN_BLEU_SCORE.*0 to 1.*{wrong!r}"):
            retrieved_tasks.configure(min_bleu_score=wrong)


def test_an_unchanged_file_is_read_once(data_dir, monkeypatch):
    calls, read = [], retrieved_tasks.read_examples
    monkeypatch.setattr(
        retrieved_tasks, "read_examples", lambda path: calls.append(path) or read(path)
    )
    write_lines(data_dir, [line(n) for n in range(5)])
    first = retrieved_tasks.read_split("which", "train")
    assert retrieved_tasks.read_split("which", "train") is first and len(calls) == 1
    # Another threshold, and another content, are read.
    retrieved_tasks.read_split("which", "train", 0.9)
    write_lines(data_dir, [line(n) for n in range(6)])
    assert len(retrieved_tasks.read_split("which", "train")) == 6 and len(calls) == 3


def test_a_file_that_is_not_the_one_of_its_note_is_rejected(data_dir):
    write_lines(data_dir, [line(n) for n in range(5)])
    path = data_dir / "which-train.jsonl"
    note = data_dir / "which-train.passages.json"
    note.write_text(json.dumps({"file_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))
    assert len(retrieved_tasks.read_split("which", "train")) == 5
    path.write_text(path.read_text().replace("words 3", "words 7"))
    with pytest.raises(ValueError, match="which-train.jsonl is not the file.*SHA-256 differs"):
        retrieved_tasks.read_split("which", "train")
    note.unlink()
    assert len(retrieved_tasks.read_split("which", "train")) == 5


REGISTER = "from glimmer_jax.data.retrieved_tasks import register\n"


@pytest.mark.parametrize(
    "source, facts",
    [
        ("x = (\n", "SyntaxError in .*__init__.py:1"),
        ("\nundefined\n", "NameError in .*__init__.py:2: name 'undefined'"),
        ("raise ValueError('no')", "ValueError in .*__init__.py:1: no"),
        (f"{REGISTER}register('{TASK}', 'w', [])", f"ValueError in .*__init__.py:2: .*{TASK}"),
        (f"{REGISTER}register(7)", "TypeError in .*__init__.py:2: "),
    ],
)
def test_a_task_module_that_fails_is_named(source, facts, tmp_path, monkeypatch):
    (tmp_path / "broken_tasks").mkdir()
    (tmp_path / "broken_tasks" / "__init__.py").write_text(source)
    (tmp_path / "broken_tasks" / "codes.py").write_text("NAMES = 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("broken_tasks", "broken_tasks.codes"):
        assert early.declared_names(module) is None
        with pytest.raises(ValueError, match=facts):
            pipeline.import_tasks(module)


def test_settings_that_a_task_module_meets_keep_their_message(tmp_path, monkeypatch):
    (tmp_path / "setting_tasks.py").write_text(
        "from glimmer_jax.data.retrieved_tasks import configure\nconfigure(min_bleu_score=2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="^MIN_BLEU_SCORE must be"):
        pipeline.import_tasks("setting_tasks")


def test_tasks_are_registered_with_the_configured_vocabulary(tmp_path):
    assert retrieved_tasks.settings().vocabulary == Vocabulary("pydocs")
    copy = tmp_path / "copy.model"
    copy.write_bytes(Vocabulary("pydocs").path.read_bytes())
    retrieved_tasks.configure(vocabulary=Vocabulary(copy))
    found = retrieved_tasks.register("with_copy", "which", [])
    retrieved_tasks.configure()
    seqio.TaskRegistry.remove("with_copy")
    assert found.output_features["inputs"].vocabulary == Vocabulary(copy).seqio()


def test_a_cache_gives_the_same_examples(data_dir, tmp_path, capsys):
    folder = str(tmp_path / "cache")
    note = data_dir / "which-dev.passages.json"
    sha256 = hashlib.sha256((data_dir / "which-dev.jsonl").read_bytes()).hexdigest()
    note.write_text(json.dumps({"file_sha256": sha256}))
    assert cache.write(TASK, folder, num_shards=3) == {"train": 10, "validation": 5}
    task = seqio.get_mixture_or_task(TASK)
    monkey = seqio.get_global_cache_dirs()
    seqio.set_global_cache_dirs([folder])
    try:
        one, other = (
            list(task.get_dataset(None, "train", cached, shuffle=False).as_numpy_iterator())
            for cached in (False, True)
        )
        assert task.num_input_examples("train") == 10
        assert task.get_cached_stats("train") == {"examples": 10}
        cache.check(task, splits=["train", "validation"])
        with pytest.raises(ValueError, match="has no test examples.*writes train and validation"):
            cache.check(task, splits=["test"])
        retrieved_tasks.configure(data_dir, 0.25)
        with pytest.raises(ValueError, match="train: min_bleu_score was 0.5 and is 0.25"):
            cache.check(task)
        cache.check(task, splits=["validation"])  # which has no filter
        retrieved_tasks.configure(data_dir)
        # As another retrieval would leave it.
        note.write_text(json.dumps({"file_sha256": "other"}))
        with pytest.raises(ValueError, match=f"validation: file_sha256 was {sha256} and is other"):
            cache.check(task)
        note.unlink()
        cache.check(task)
        shard = next((tmp_path / "cache").rglob("train.tfrecord-00001-of-00003"))
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1])
        with pytest.raises(
            ValueError, match="cache of which_test is damaged: .*00001-of-00003 has"
        ):
            cache.check(task)
        shard.unlink()
        with pytest.raises(ValueError, match="has 0 bytes instead of"):
            cache.check(task)
        shard.write_bytes(whole)
        completed = shard.with_name(cache.COMPLETED)
        table = completed.read_bytes()
        for damaged in (b"", b"\xff", b'{"bytes": null}', b"[" * 100_000):
            completed.write_bytes(damaged)
            with pytest.raises(ValueError, match="which_test is damaged: .*no table of sizes"):
                cache.check(task)
        completed.unlink()
        os.mkfifo(completed)
        with pytest.raises(OSError, match="COMPLETED is a pipe"):
            cache.check(task)
        completed.unlink()
        completed.write_bytes(table)
        # seqio's own tool writes an empty file.
        ours = {info: info.read_text() for info in completed.parent.glob("info.*.json")}
        for info, text in ours.items():
            info.write_text(text.replace(cache.WRITER, "seqio"))
        completed.write_bytes(b"")
        cache.check(task)
        completed.write_bytes(table)
        for info, text in ours.items():
            info.write_text(text)
    finally:
        seqio.set_global_cache_dirs(monkey)
        task._cache_dir = None
    one, other = (sorted(rows, key=lambda row: row["id"]) for rows in (one, other))
    for name in ("id", "inputs", "answers", "passage_ids", "gold_passages"):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a[name], b[name])
    with pytest.raises(ValueError, match="complete cache of which_test"):
        cache.write(TASK, folder)
    cache_tasks(TASK, "tests.tasks_test", data_dir, folder)
    assert "which_test: already cached" in capsys.readouterr().out
    with pytest.raises(ValueError, match="min_bleu_score was 0.5 and is 0.1"):
        cache_tasks(TASK, "tests.tasks_test", data_dir, folder, 0.1)
    with pytest.raises(ValueError, match="CACHE_DIR is written to a local disk, got gs://b/c"):
        cache_tasks(TASK, "tests.tasks_test", data_dir, "gs://b/c")
    retrieved_tasks.configure(data_dir)
    (data_dir / "which-dev.jsonl").unlink()
    with pytest.raises(ValueError, match="DATA_DIR.*which-dev"):
        cache.write(TASK, str(tmp_path / "other"))
    assert not list((tmp_path / "other").rglob(cache.COMPLETED))
    with pytest.raises(ValueError, match="there is no complete cache.*--run_mode=cache"):
        check_fit(
            TASK,
            "train",
            LENGTHS,
            vocabulary=Vocabulary("pydocs"),
            has_passages=True,
            use_cached=True,
        )


def test_lines_are_counted_for_mixing_rates(data_dir):
    mixture = f"{TASK}_by_size"
    seqio.MixtureRegistry.add(mixture, [(TASK, seqio.mixing_rate_num_examples)])
    mixed = seqio.get_mixture_or_task(mixture)
    assert mixed.get_rate(seqio.TaskRegistry.get(TASK)) == 10
    assert mixed.num_input_examples("validation") == 5
    seqio.MixtureRegistry.remove(mixture)


def test_kilts_tasks_have_their_sizes_splits_and_metrics():
    from tasks import kilt as kilt_registrations

    mixture = seqio.get_mixture_or_task("kilt_glimmer")
    names = {f"kilt_{name}" for name in kilt_registrations.GLIMMER}
    assert {task.name for task in mixture.tasks} == names and len(names) == 6
    assert {mixture.get_rate(task) for task in mixture.tasks} == {1.0}
    # Train, dev and test of T-REx.
    trex = seqio.get_mixture_or_task("kilt_trex")
    sizes = [trex.num_input_examples(split) for split in ("train", "validation", "test")]
    assert sizes == [2_284_168, 5_000, 5_000]
    assert set(seqio.get_mixture_or_task("kilt_cweb").splits) == {"validation", "test"}
    assert len([n for n in seqio.TaskRegistry.names() if n.startswith("kilt_")]) == 11
    for name in names:
        assert seqio.get_mixture_or_task(name).supports_caching


def test_evaluation_calls_plain_functions_on_batches(data_dir, passages, tmp_path):
    vocabulary = Vocabulary("pydocs")
    run = evaluation.Evaluation(
        TASK, "validation", LENGTHS, 4, passages=passages, log_dir=str(tmp_path / "logs")
    )
    shapes = []

    def predict(batch):
        shapes.append(batch["passage_tokens"].shape)
        # Ragged over batches, as decoding with an early stop could be.
        answer = [*vocabulary.encode("dumps"), 1, *[0] * len(shapes)]
        rows = len(batch["question_tokens"])
        return np.tile(np.int32(answer), (rows, 1)), {"first": batch["gold_passages"][:, 1]}

    metrics = run.run(predict, step=7)
    assert metrics == {f"{TASK}/exact_match": 100.0, f"{TASK}/recall": 1.0}
    assert set(shapes) == {(4, 3, 12)}
    assert [one["id"] for one in run.examples()[TASK]] == [f"q{i}".encode() for i in range(5)]
    # A resumed run evaluates a step again; its line is replaced.
    for step in (9, 11, 9):
        run.run(predict, step=step)
    lines = (tmp_path / "logs" / f"{TASK}-metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [7, 9]
    with pytest.raises(ValueError, match="metrics .*split 'other'"):
        evaluation.Evaluation(TASK, "other", LENGTHS, 4)


def test_the_retriever_is_evaluated_on_the_same_questions(data_dir, passages, caplog):
    run = evaluation.Evaluation(TASK, "validation", LENGTHS, 4)
    # The gold passage is the second of three.
    assert run.retriever() == {f"{TASK}/n": 5, f"{TASK}/retriever_recall_at_1": 0.0}
    titles = passages.titles([10 + i for i in range(4)])
    lines = [{**line(i), "output": [{"answer": titles[i % 4].upper()}]} for i in range(4)]
    for example in lines[:3]:
        example["retrieved"][0]["gold"] = True
    write_lines(data_dir, [*lines, line(7)], "dev")
    run = evaluation.Evaluation(TASK, "validation", LENGTHS, 4)
    metrics = run.retriever(passages)
    assert metrics == {
        f"{TASK}/n": 5,
        f"{TASK}/retriever_recall_at_1": 0.6,
        f"{TASK}/retriever_exact_match": 0.8,
    }
    caplog.clear()
    reranking.warn_of_reranking({**metrics, f"{TASK}/recall_at_1": 0.6})
    assert not caplog.records
    reranking.warn_of_reranking({**metrics, f"{TASK}/recall_at_1": 0.4})
    assert (
        f"{TASK}: the reranker's recall at 1 is 0.400, below the retriever's 0.600" in caplog.text
    )


def equal_scores(batch):
    rows, passages = batch["passage_ids"].shape
    aux = {"passage_scores": np.zeros((rows, passages), np.float32), "first": np.ones(rows)}
    aux["kept_passages"] = np.zeros((rows, 1), np.int32)
    return np.ones((rows, 1), np.int32), aux


def test_predictions_hold_question_gold_answers_and_titles(data_dir, passages, caplog):
    run = evaluation.Evaluation(TASK, "validation", LENGTHS, 4, passages=passages)

    def predict(batch):
        rows = len(batch["question_tokens"])
        aux = {"passage_scores": np.tile(np.float32([1, 3, 2]), (rows, 1))}
        aux["kept_passages"] = np.ones((rows, 1), np.int32)
        aux["first"] = np.ones(rows)
        return np.tile(np.int32([1]), (rows, 1)), aux

    run.run(predict)
    first = run.predictions(passages)[TASK][0]
    assert (first["question"], first["answers"]) == ("words 0", ["json.dumps", "dumps"])
    assert first["passage_ids"] == [11, 12, 10]
    assert first["passage_titles"] == passages.titles([11, 12, 10])
    assert "passage_titles" not in run.predictions()[TASK][0]
    assert "PASSAGES_DIR" not in caplog.text


def test_string_ids_that_cannot_be_restored_are_a_warning(data_dir, tmp_path, caplog):
    records = [{"id": f"doc-{i}", "title": "t", "text": "x"} for i in range(3)]
    write_passages(tmp_path / "p", records, lambda text: [5], "f", 12, vocab_size=99)
    retrieved = [{"id": record["id"]} for record in records]
    write_lines(data_dir, [{**line(0), "retrieved": retrieved}], "dev")
    run = evaluation.Evaluation(TASK, "validation", LENGTHS, 1)
    run.run(equal_scores)
    given = run.predictions(Passages.open(tmp_path / "p"))[TASK][0]
    assert given["passage_ids"] == ["doc-0", "doc-1", "doc-2"]
    assert "PASSAGES_DIR" not in caplog.text
    numbers = run.predictions()[TASK][0]["passage_ids"]
    assert all(isinstance(number, int) for number in numbers)
    assert "PASSAGES_DIR" in caplog.text and "MEMORY_DIR" in caplog.text
