import sys

import pytest

from glimmer_jax.pydocs import corpus, corpus_files, objects
from glimmer_jax.storage.json_lines import read_json_lines


@pytest.fixture(scope="module")
def records():
    return list(corpus.passages())


def test_there_are_thousands_of_short_passages(records):
    assert len(records) > 4000
    # Words are never split, so a single long word may exceed the limit.
    assert max(len(r["text"]) for r in records if " " in r["text"]) <= corpus.MAX_CHARACTERS
    assert all(record["text"] == " ".join(record["text"].split()) for record in records)


def test_ids_are_unique_stable_and_fit_an_int64(records):
    ids = [record["id"] for record in records]
    assert len(set(ids)) == len(ids) and min(ids) >= 0 and max(ids) < 2**63
    assert corpus.passage_id("json.dumps", 0) == 188702015237344324


def test_passages_start_with_the_signature_without_self(records):
    by_key = {(record["page"], record["chunk"]): record for record in records}
    dumps = by_key["json.dumps", 0]
    assert dumps["text"].startswith("dumps(obj, *, skipkeys=False, ensure_ascii=True,")
    assert dumps["signature"] == dumps["text"][: len(dumps["signature"])]
    assert by_key["str.join", 0]["text"].startswith("join(iterable, /) ")
    assert not by_key["json.dumps", 1]["text"].startswith("dumps(")


def test_one_docstring_has_one_page():
    docs = [" ".join(page.documented.doc.split()).lower() for page in corpus.pages()]
    assert len(set(docs)) == len(docs)
    names = {page.name for page in corpus.pages()}
    assert "random.choice" in names and "random.Random.choice" not in names
    assert "os.path.join" in names and "posixpath.join" not in names


def test_a_module_belongs_to_one_fixed_split(records):
    splits = {}
    for record in records:
        splits.setdefault(record["module"].split(".")[0], set()).add(record["split"])
    assert all(len(module_splits) == 1 for module_splits in splits.values())
    # A change here would move held-out modules into the training data of the shipped checkpoints.
    fixed = {"json": "train", "logging": "train", "argparse": "dev", "xml": "dev"}
    fixed |= {"topics": "train", "builtins": "train", "decimal": "train"}
    assert {name: corpus.split_of(name) for name in fixed} == fixed
    assert corpus.split_of("email.mime.text") == corpus.split_of("http.client")
    share = {s: sum(r["split"] == s for r in records) / len(records) for s in corpus.SPLITS}
    assert 0.6 < share["train"] < 0.8 and share["dev"] > 0.04 and share["test"] > 0.12


def test_training_text_is_from_training_modules_only():
    assert {record["split"] for record in corpus.train_texts()} == {"train"}


def test_collecting_objects_imports_no_module_in_this_process():
    before = set(sys.modules)
    assert objects.documented_objects()
    assert not {"turtle", "asyncio.events", "nntplib", "cgitb"} & (set(sys.modules) - before)


def test_a_failed_collection_reports_the_error_of_its_process(monkeypatch):
    monkeypatch.setattr(objects, "__file__", "/absent.py")
    with pytest.raises(RuntimeError, match=r"absent\.py failed: .*absent"):
        objects.documented_objects()


def test_defaults_that_differ_between_machines_are_elided():
    spelled = objects._spelled
    assert [spelled(x) for x in (None, "utf-8", (1, 2.5), 3, {})] == [
        "None", "'utf-8'", "...", "3", "{}",
    ]  # fmt: skip
    assert spelled(object()) == "..." and spelled("/usr/lib") == "..." and spelled(int) == "int"


def test_sentences_omit_interpreter_sessions_and_borders():
    doc = "Adds two\nnumbers. Returns int.\n\n>>> add(1, 2)\n3\n\nTitle\n=====\n\n+----+\nOne | two.\n"
    assert corpus.sentences(doc) == ["Adds two numbers.", "Returns int.", "Title", "One two."]


def test_chunks_keep_sentences_intact_and_within_the_limit():
    texts = ["aa bb c", "dd e", "f g h i j kk l mm"]
    assert corpus.pack(texts, 4, 10) == ((), ("aa bb c",), ("dd e",), ("f g h i j",), ("kk l mm",))
    assert corpus.pack(texts[:2], 0, 12) == (("aa bb c", "dd e"),)
    assert corpus.pack(texts[:1], 2, 10) == (("aa bb c",),)


def test_write_corpus_writes_all_records_and_questions(
    tmp_path, monkeypatch, records, pydocs_examples
):
    monkeypatch.setattr("glimmer_jax.pydocs.questions.all_tasks", lambda: pydocs_examples)
    counts = corpus_files.write_corpus(tmp_path)
    assert [record for _, record in read_json_lines(tmp_path / "corpus.jsonl")] == records
    assert counts["questions/slot_filling-dev.jsonl"] == len(pydocs_examples["slot_filling", "dev"])
    assert len(list((tmp_path / "questions").iterdir())) == 9
