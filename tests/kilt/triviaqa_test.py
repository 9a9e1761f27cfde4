import json

import pyarrow
import pytest
from pyarrow import parquet

from glimmer_jax.kilt import examples, files


def write(path, **questions):
    rows = [
        {"QuestionId": name, "Question": text, "Answer": {}} for name, text in questions.items()
    ]
    path.write_text(json.dumps({"Data": rows, "Domain": "Web"}))


def test_questions_of_all_files_are_joined_by_id(tmp_path):
    write(tmp_path / "unfiltered-web-train.json", tc_1="Who?", tc_2="Where?")
    # The same question may be in several archives.
    write(tmp_path / "unfiltered-web-dev.json", tc_1="Who?", tc_3="When?")
    found = files.read_questions(str(tmp_path / "*.json"))
    assert found == {"tc_1": "Who?", "tc_2": "Where?", "tc_3": "When?"}
    path = tmp_path / "triviaqa-dev_id-kilt.jsonl"
    path.write_text('{"id": "tc_3", "input": ""}\n{"id": "tc_1"}\n{"id": "x", "input": "own"}\n')
    read = [example["input"] for example in examples.read_examples(path, questions=found)]
    assert read == ["When?", "Who?", "own"]
    path.write_text('{"id": "tc_4", "input": ""}\n')
    with pytest.raises(ValueError, match=":1: 'tc_4' .*question.*splits"):
        list(examples.read_examples(path, questions=found))


def test_the_hubs_tables_have_them_too(tmp_path):
    table = pyarrow.table({"question_id": ["tc_1"], "question": ["Who?"], "answer": [""]})
    parquet.write_table(table, tmp_path / "train.parquet")
    assert files.read_questions(str(tmp_path / "*.parquet")) == {"tc_1": "Who?"}
    for ids in ([["tc_1"]], [None], [1]):
        table = pyarrow.table({"question_id": ids, "question": ["Who?"]})
        parquet.write_table(table, tmp_path / "train.parquet")
        with pytest.raises(ValueError, match="TRIVIAQA: .*train.parquet: expected strings"):
            files.read_questions(str(tmp_path / "*.parquet"))


def test_other_files_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="TRIVIAQA: no file matches"):
        files.read_questions(str(tmp_path / "*.json"))
    write(tmp_path / "a.json", tc_1="Who?")
    write(tmp_path / "b.json", tc_1="Where?")
    with pytest.raises(ValueError, match="TRIVIAQA: .*b.json .*'tc_1'"):
        files.read_questions(str(tmp_path / "*.json"))
    listed = '{"Data": [{"QuestionId": ["a"], "Question": "Who?"}]}'
    for text in ("{", "[]", "[" * 100_000, '{"Data": [{"QuestionId": 1}]}', listed):
        (tmp_path / "c").write_text(text)
        with pytest.raises(ValueError, match="TRIVIAQA: .*c: expected .*QuestionId"):
            files.read_questions(str(tmp_path / "c"))
