"""SIGTERM while questions are searched for: 42, and no file that was not finished."""

import json
import re

import pytest

from glimmer_jax.corpus.passages_writer import write_passages
from tests.modes import stopping
from tests.modes.retrieve_test import WORDS
from tests.retrieval import tiny_gtr


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Some passages, and more questions than can be answered before somebody is impatient."""
    folder = tmp_path_factory.mktemp("work")
    records = ({"id": i, "title": f"t{i}", "text": WORDS[i % 8]} for i in range(4000))
    write_passages(
        folder / "passages", records, lambda text: list(text.encode()), "f", 99, vocab_size=256
    )
    (folder / "questions").mkdir()
    lines = ({"id": str(i), "input": f"{WORDS[i % 8]} t{i}", "output": []} for i in range(100_000))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "questions" / "task-test.jsonl").write_text(text)
    tiny_gtr.write(folder / "gtr", words_alone=True)
    return folder


@pytest.mark.fault
@pytest.mark.parametrize(
    ("program", "retriever"),
    [(stopping.ALONE, "bm25"), (stopping.TWO, "dense")],
    ids=["alone", "two"],
)
def test_a_search_that_is_stopped_ends_with_42_and_leaves_no_half_file(
    work, tmp_path, program, retriever
):
    dense = {"ENCODER_DIR": str(work / "gtr"), "INDEX_DIR": str(tmp_path / "index")}
    code, said = stopping.stopped(
        program,
        "task-test.jsonl: 100000 questions",
        "retrieve",
        "runs/retrieve",
        PASSAGES_DIR=str(work / "passages"),
        QUESTIONS=str(work / "questions" / "*.jsonl"),
        DATA_DIR=str(tmp_path / "out"),
        RETRIEVER=retriever,
        **(dense if retriever == "dense" else {}),
    )
    # At once, where a busy machine compiles the search for longer than a stop waits.
    assert code == 42 and re.search("glimmer: Stopped (at once )?by SIGTERM", said), said
    assert not list((tmp_path / "out").glob("*"))
