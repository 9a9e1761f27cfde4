"""Mode `retrieve` with each retriever, from passages and questions to files and scores."""

import collections
import json
import os
import sys

import gin
import pytest

from glimmer_jax import main as command_line
from glimmer_jax.corpus import retrieved_notes
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.corpus.reading import Reading, read_passages
from glimmer_jax.data.retrieved_tasks import configure, read_split
from glimmer_jax.modes.retrieve import _files, retrieve
from glimmer_jax.retrieval import retriever as retrievers
from glimmer_jax.retrieval.bm25 import Bm25Retriever
from glimmer_jax.retrieval.config import RetrieverConfig
from glimmer_jax.retrieval.dense import DenseConfig
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.storage import folder
from glimmer_jax.storage.json_lines import read_json_lines, write_json_lines
from tests.retrieval import tiny_gtr

WORDS = (
    "socket server request",
    "thread lock acquire",
    "string pattern match",
    "integer sum product",
    "file path directory",
    "encode bytes decode",
    "list append sort",
    "time zone clock",
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Eight passages on four pages, the second half of which are held out, and their questions."""
    folder = tmp_path_factory.mktemp("work")
    records = [
        {
            "id": 50 + i,
            "title": words.split()[0],
            "text": f"about {words}",
            "page": f"p{i // 2}",
            "chunk": i % 2,
            "split": "train" if i < 4 else "test",
        }
        for i, words in enumerate(WORDS)
    ]
    write_passages(
        folder / "passages", records, lambda text: list(text.encode()), "f", 99, vocab_size=256
    )
    (folder / "questions").mkdir()
    for split, rows in (("train", range(4)), ("test", range(4, 8))):
        lines = []
        for row in rows:
            page, chunk = records[row]["page"], records[row]["chunk"]
            where = [{"wikipedia_id": page, "start_paragraph_id": chunk}]
            question = " ".join(WORDS[row].split()[1:])
            output = [{"answer": "yes", "provenance": where}]
            lines.append({"id": f"q{row}", "input": question, "output": output})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "questions" / f"task-{split}.jsonl").write_text(text)
    tiny_gtr.write(folder / "gtr", words_alone=True)
    return folder


def settings(work, data_dir, method="bm25", **dense):
    config = dict(encoder_dir=str(work / "gtr"), index_dir=str(work / "index"), batch_size=2)
    config = DenseConfig(**{**config, "shard_passages": 3, **dense})
    return dict(
        passages_dir=str(work / "passages"),
        questions=str(work / "questions" / "*.jsonl"),
        data_dir=str(data_dir),
        num_passages=5,
        retriever=RetrieverConfig(method, dense=config),
    )


@pytest.mark.parametrize("retriever", ["bm25", "dense", "hybrid"])
def test_files_have_passages_and_scores_and_training_sees_its_own(
    work, tmp_path, retriever, capsys
):
    report = retrieve(**settings(work, tmp_path, retriever))
    rows = [row for _, row in read_json_lines(tmp_path / "task-test.jsonl")]
    assert [row["retrieved"][0]["id"] for row in rows] == [54, 55, 56, 57]
    for row in rows:
        scores = [one["score"] for one in row["retrieved"]]
        assert scores == sorted(scores, reverse=True) and row["retrieved"][0]["gold"]
        assert len(scores) == 5 or retriever == "bm25"
    trained = [row for _, row in read_json_lines(tmp_path / "task-train.jsonl")]
    assert {one["id"] for row in trained for one in row["retrieved"]} <= {50, 51, 52, 53}
    perfect = {"questions": 4, "recall_at_1": 1.0, "recall_at_5": 1.0}
    assert report["passages"] == {"task-test": perfect, "task-train": perfect}
    pages = {"questions": 4, "Rprec": 1.0, "recall@5": 1.0}
    assert report["pages"] == {"task-test": pages, "task-train": pages}
    shown = capsys.readouterr().out
    assert "4 of 4 questions" in shown and "questions/s" in shown
    assert "R@1" in shown and "KILT's R-precision" in shown and "Rprec" in shown
    # The files are what tasks read.
    configure(tmp_path)
    read = read_split("task", "test").dataset().as_numpy_iterator()
    configure()
    assert [one["passage_ids"][0] for one in read] == [54, 55, 56, 57]


@pytest.mark.parametrize("retriever", ["bm25", "dense", "hybrid"])
def test_kilts_published_files_are_taken_as_they_are(work, tmp_path, retriever):
    questions = tmp_path / "questions"
    questions.mkdir()
    # TriviaQA's have ids alone, and in test files no output.
    names = [{"id": f"tc_{row}", "input": ""} for row in range(8)]
    write_json_lines(questions / "triviaqa-test_id_without_answers-kilt.jsonl", names)
    theirs = [
        {"QuestionId": f"tc_{row}", "Question": " ".join(words.split()[1:])}
        for row, words in enumerate(WORDS)
    ]
    (tmp_path / "wikipedia.json").write_text(json.dumps({"Data": theirs}))
    # Of a dialogue the last words count.
    said = {"id": 7, "input": "socket server request\nserver request\nlock acquire"}
    write_json_lines(questions / "wow-dev-kilt.jsonl", [said])
    given = settings(work, tmp_path / "out", retriever)
    given |= {"question_words": 2}
    given |= {"questions": f"{questions}/*-kilt.jsonl", "triviaqa": f"{tmp_path}/wikipedia*.json"}
    assert retrieve(**given) == {"passages": {}, "pages": {}}
    rows = [row for _, row in read_json_lines(tmp_path / "out" / "triviaqa-test.jsonl")]
    assert [row["input"] for row in rows] == [one["Question"] for one in theirs]
    assert [row["retrieved"][0]["id"] for row in rows] == list(range(50, 58))
    ((_, row),) = read_json_lines(tmp_path / "out" / "wow-dev.jsonl")
    assert (row["id"], row["input"], row["retrieved"][0]["id"]) == ("7", "lock acquire", 51)
    assert {path.name for path in (tmp_path / "out").glob("*.passages.json")} == {
        *("triviaqa-test.passages.json", "wow-dev.passages.json")
    }
    retrieved_notes.check(tmp_path / "out", Passages.open(work / "passages"))


def test_every_stage_of_retrieval_polls_the_stop_signal(work, tmp_path, monkeypatch):
    asked = collections.Counter()
    monkeypatch.setattr(
        STOP, "poll_together", lambda: asked.update([sys._getframe(1).f_globals["__name__"]])
    )
    retrieve(**settings(work, tmp_path, "hybrid"))
    # Each question; each batch of questions and each block of the index, for either file. Before
    # that the passages, read for the split and for either index of BM25, and the block held on the
    # devices.
    retrieval = "glimmer_jax.retrieval"
    assert asked == {
        f"{retrieval}.bm25": 8,
        f"{retrieval}.text_encoder": 2,
        f"{retrieval}.top_k": 2,
        "glimmer_jax.runtime.preemption": 4,
    }


def test_examples_are_read_as_they_are_searched_for(work):
    retriever = Bm25Retriever(Passages.open(work / "passages"))
    retriever.questions_at_a_time = 2
    read = []

    def examples():
        for row in range(5):
            read.append(row)
            yield {"id": str(row), "input": WORDS[row]}

    found = retrievers.retrieve(retriever, examples(), 1)
    assert read == [] and next(found)["retrieved"][0]["id"] == 50 and read == [0, 1]
    assert [one["retrieved"][0]["id"] for one in found] == [51, 52, 53, 54]


def test_a_split_that_hides_nothing_needs_no_second_index(work, tmp_path, monkeypatch):
    records = [{"id": i, "title": words, "text": words} for i, words in enumerate(WORDS)]
    write_passages(
        tmp_path / "passages", records, lambda text: list(text.encode()), "f", 99, vocab_size=256
    )
    asked = []
    monkeypatch.setattr(Bm25Retriever, "among", lambda self, rows: asked.append(rows) or self)
    given = settings(work, tmp_path / "out")
    retrieve(**{**given, "passages_dir": str(tmp_path / "passages")})
    assert asked == []
    retrieve(**given, overwrite=True)
    assert [rows.tolist() for rows in asked] == [[0, 1, 2, 3]]


def test_from_disk_and_on_the_devices_the_files_are_the_same_bytes(work, tmp_path, caplog):
    caplog.set_level("INFO")
    made = []
    for size, where in ((10**9, "on the devices"), (0, "from disk, in blocks")):
        retrieve(**settings(work, tmp_path / str(size), "dense", bytes_per_device=size))
        made.append((tmp_path / str(size) / "task-test.jsonl").read_bytes())
        assert f"searched {where}" in caplog.text
    assert made[0] == made[1]


def test_the_command_builds_the_index_and_rejects_another_encoder(work, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    values = {
        "PASSAGES_DIR": str(work / "passages"),
        "QUESTIONS": str(work / "questions" / "*-test.jsonl"),
        "DATA_DIR": str(tmp_path / "out"),
        "INDEX_DIR": str(tmp_path / "index"),
        "RETRIEVER": "dense",
        "NUM_PASSAGES": 3,
        "DENSE_BATCH_SIZE": 2,
        "OVERWRITE": True,
    }

    def run(encoder_dir):
        flags = [f"--gin.{name}={value!r}" for name, value in values.items()]
        flags.append(f"--gin.ENCODER_DIR='{encoder_dir}'")
        code = command_line.main(
            ["--run_mode=retrieve", "--gin_file=gin/runs/retrieve.gin", *flags]
        )
        gin.clear_config()
        return code, capsys.readouterr()

    code, shown = run(work / "gtr")
    assert code == 0 and "a GTR in" in caplog.text and "8 vectors of 48" in caplog.text
    code, shown = run(tiny_gtr.write(tmp_path / "other", seed=1))
    assert code == 2 and "INDEX_DIR" in shown.err and "encoder" in shown.err
    assert shown.err.count("sha256:") >= 2


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack", "config.json"])
def test_another_encoder_is_another_request(tmp_path, name):
    (tmp_path / name).write_bytes(b"one")
    before = _files(str(tmp_path))
    (tmp_path / name).write_bytes(b"two")
    assert _files(str(tmp_path)) != before


def test_passages_without_pages_have_no_scores_of_pages(work, tmp_path, capsys):
    records = [{"id": i, "title": words, "text": words} for i, words in enumerate(WORDS)]
    write_passages(
        tmp_path / "passages", records, lambda text: list(text.encode()), "f", 99, vocab_size=256
    )
    given = settings(work, tmp_path / "out")
    report = retrieve(**{**given, "passages_dir": str(tmp_path / "passages")})
    assert report["pages"] == {} and "KILT" not in capsys.readouterr().out
    # A split that no passage names hides none.
    rows = [row for _, row in read_json_lines(tmp_path / "out" / "task-train.jsonl")]
    assert {one["id"] for row in rows for one in row["retrieved"]} >= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"retriever": RetrieverConfig("colbert")},
            "RETRIEVER must be one of bm25, dense, hybrid, got 'colbert'",
        ),
        ({"num_passages": 0}, "NUM_PASSAGES must be 1 or more, got 0"),
        ({"questions": "nothing*"}, "QUESTIONS: no file matches 'nothing"),
        (
            {"retriever": RetrieverConfig("hybrid", dense=DenseConfig("x", "y"), dense_weight=2.0)},
            "DENSE_WEIGHT",
        ),
        (
            {"retriever": RetrieverConfig("dense", dense=DenseConfig(encoder_dir="x"))},
            "needs INDEX_DIR.*ENCODER_DIR.*INDEX_DIR",
        ),
    ],
)
def test_settings_are_checked(work, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        retrieve(**{**settings(work, tmp_path), **changes})


def test_questions_are_not_overwritten_and_lines_are_checked_first(work, tmp_path):
    with pytest.raises(ValueError, match="DATA_DIR: .* holds the QUESTIONS themselves"):
        retrieve(**settings(work, work / "questions"))
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "a-test.jsonl").write_text('{"id": "1"}\n')
    given = settings(work, tmp_path / "out", "dense", index_dir=str(tmp_path / "index"))
    pattern = str(tmp_path / "questions" / "*")
    with pytest.raises(ValueError, match="a-test.jsonl:1: '1' .*`input`"):
        retrieve(**{**given, "questions": pattern})
    assert not (tmp_path / "index").exists()
    (tmp_path / "questions" / "a-test.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="QUESTIONS: a-test.jsonl has no questions"):
        retrieve(**{**given, "questions": pattern})


def test_complete_files_are_kept_others_need_overwrite(work, tmp_path, capsys):
    report = retrieve(**settings(work, tmp_path))
    (tmp_path / "task-train.jsonl").unlink()
    before = (tmp_path / "task-test.jsonl").stat().st_mtime_ns
    assert retrieve(**settings(work, tmp_path)) == report
    assert "task-test.jsonl is complete and kept" in capsys.readouterr().out
    assert (tmp_path / "task-test.jsonl").stat().st_mtime_ns == before
    given = {**settings(work, tmp_path), "num_passages": 2}
    with pytest.raises(ValueError, match=r"DATA_DIR: .*task-test\.jsonl exists.*OVERWRITE=True"):
        retrieve(**given)
    retrieve(**given, overwrite=True)
    rows = [row for _, row in read_json_lines(tmp_path / "task-test.jsonl")]
    assert max(len(row["retrieved"]) for row in rows) <= 2


@pytest.mark.parametrize("renamed", [False, True])
def test_a_file_is_kept_if_its_command_was_killed_after_the_file_appeared(
    work, tmp_path, monkeypatch, capsys, renamed
):
    replace = os.replace

    def killed(source, target):
        if renamed:
            replace(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            retrieve(**settings(work, tmp_path))
    (note,) = tmp_path.glob("*.passages.json")
    name = note.name.replace(".passages.json", ".jsonl")
    assert (tmp_path / name).exists() == renamed
    retrieve(**settings(work, tmp_path))
    assert (f"{name} is complete and kept" in capsys.readouterr().out) == renamed
    assert len(list(tmp_path.glob("*.jsonl"))) == len(list(tmp_path.glob("*.passages.json"))) == 2


def test_a_file_that_was_to_be_replaced_does_not_pass_for_the_new_one(work, tmp_path, monkeypatch):
    for name in ("task-test", "task-train"):
        (tmp_path / f"{name}.jsonl").write_text('{"id": "old"}\n')

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            retrieve(**settings(work, tmp_path), overwrite=True)
    path = tmp_path / "task-test.jsonl"
    with pytest.raises(ValueError, match="task-test.jsonl is not the file .* wrote"):
        retrieved_notes.check_content(path, path, retrieved_notes.file_sha256(path))
    retrieve(**settings(work, tmp_path), overwrite=True)
    retrieved_notes.check_content(path, path, retrieved_notes.file_sha256(path))
    rows = [row for _, row in read_json_lines(tmp_path / "task-test.jsonl")]
    assert "old" not in {row["id"] for row in rows} and len(rows) == 4


@pytest.fixture
def road(tmp_path):
    """From records and questions to the retrieved file's lines and the report."""

    def run(records, questions, name="nq-dev"):
        corpus = tmp_path / "corpus.jsonl"
        write_json_lines(corpus, records)
        format = "kilt" if "wikipedia_id" in records[0] else "passages"
        read = read_passages([str(corpus)], Reading(format, 100))
        encode = lambda text: list(text.encode())  # noqa: E731
        folder = tmp_path / "passages"
        write_passages(folder, read, encode, "f", 99, vocab_size=256, overwrite=True)
        (tmp_path / "questions").mkdir(exist_ok=True)
        write_json_lines(tmp_path / "questions" / f"{name}.jsonl", questions)
        pattern, out = f"{tmp_path}/questions/{name}.jsonl", tmp_path / "out"
        report = retrieve(str(folder), pattern, str(out), 2, overwrite=True)
        return [line for _, line in read_json_lines(out / f"{name}.jsonl")], report

    return run


def question(text, **place):
    output = [{"answer": "x", "provenance": [place]}] if place else [{"answer": "x"}]
    return {"id": "q", "input": text, "output": output}


EMMA = {"id": 1, "title": "Emma", "text": "Emma is a novel by Jane Austen."}


def test_composed_questions_find_decomposed_passages(road):
    bar = {"id": 2, "title": "Bar", "text": "A bar, and a singer may sing there."}
    singer = {"id": 1, "title": "Beyonce\u0301", "text": "Beyonce\u0301 is a singer."}
    asked = question("Beyonc\u00e9", title="Beyonc\u00e9")
    (line,), report = road([singer, bar], [asked])
    assert [(one["id"], one["gold"]) for one in line["retrieved"]] == [(1, True)]
    assert report["passages"]["nq-dev"]["recall_at_1"] == 1.0


def test_thai_shirts_are_no_tigers(road):
    tiger = {"id": 1, "title": "", "text": "เสือ เป็น สัตว์"}
    shirt = {"id": 2, "title": "", "text": "เสื้อ ทำ จาก ผ้า"}
    (line,), _ = road([tiger, shirt], [question("เสื้อ")])
    assert [one["id"] for one in line["retrieved"]] == [2]


def test_a_corpus_without_words_has_no_results(road):
    (line,), _ = road([{"id": 1, "title": "...", "text": "!!! ???"}], [question("who")])
    assert line["retrieved"] == []


def test_questions_without_hits_bring_no_scores_of_pages(road, capsys):
    asked = [question("???", title="Emma"), {**question("novel", title="Emma"), "id": "r"}]
    _, report = road([EMMA], asked)
    assert report["pages"] == {} and "KILT" not in capsys.readouterr().out
    assert report["passages"]["nq-dev"]["recall_at_1"] == 0.5


def test_titles_decide_where_provenance_has_no_id(road):
    page = {"wikipedia_id": "15782", "wikipedia_title": "Emma", "text": ["Emma\n", "A novel.\n"]}
    (line,), report = road([page], [question("novel Emma", title="Emma")])
    assert line["retrieved"][0]["gold"] and report["passages"]["nq-dev"]["recall_at_1"] == 1.0


def test_null_page_and_split_equal_absent(road):
    records = [{**EMMA, "page": None, "split": None}, {**EMMA, "id": 2, "split": "test"}]
    (line,), _ = road(records, [question("novel Emma", title="Emma")], "nq-train")
    assert [(one["id"], one["gold"]) for one in line["retrieved"]] == [(1, True)]


def test_string_ids_come_back_as_they_were(road, monkeypatch):
    records = [{**EMMA, "id": "doc/é-1"}, {**EMMA, "id": "007", "title": "x"}]
    (line,), report = road(records, [question("novel Emma", wikipedia_id="doc/é-1")])
    assert [(one["id"], one["gold"]) for one in line["retrieved"]] == [
        ("doc/é-1", True),
        ("007", False),
    ]
    assert report["passages"]["nq-dev"]["recall_at_1"] == 1.0


def test_provenance_that_names_no_passage_gets_a_warning_with_examples(road, caplog):
    road([EMMA], [question("novel", wikipedia_id="99", title="Persuasion")])
    (record,) = [one for one in caplog.records if "no provenance" in one.getMessage()]
    assert "wikipedia_id '99', title 'Persuasion'" in record.getMessage()
    caplog.clear()
    # It names a passage, which was not found.
    road([EMMA], [question("???", title="Emma")])
    assert "no provenance" not in caplog.text
