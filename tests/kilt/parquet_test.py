import sys

import pyarrow
import pytest
from pyarrow import parquet

from glimmer_jax.kilt import examples
from glimmer_jax.kilt.examples import read_parquet
from glimmer_jax.storage.parquet import read_rows
from tests import mini_kilt

META = {"fever_page_id": "", "fever_sentence_id": -1, "annotation_id": "-1", "evidence_span": []}
NUMBERS = ("start_paragraph_id", "start_character", "end_paragraph_id", "end_character")


def hub_row(line):
    """A line as the hub's conversion spells it: what is absent is "", 0 or -1."""
    outputs = []
    for one in line.get("output", []):
        found = [
            {name: p.get(name, "") for name in ("wikipedia_id", "title", "section")}
            | {name: p.get(name, -1) for name in NUMBERS}
            | {"bleu_score": p.get("bleu_score", -1.0), "meta": META}
            for p in one.get("provenance", [])
        ]
        answer = one.get("answer", "")
        outputs.append({"answer": answer, "meta": {"score": 0}, "provenance": found})
    meta = {"left_context": "", "mention": "", "template_questions": []}
    return {"id": str(line["id"]), "input": line["input"], "meta": meta, "output": outputs}


@pytest.mark.parametrize("task", mini_kilt.TASKS)
def test_the_hubs_tables_read_as_kilts_lines(tmp_path, task):
    lines = list(mini_kilt.lines(task, "dev"))
    path = tmp_path / "dev.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([hub_row(line) for line in lines]), path)
    found = [line for _, line in read_parquet(path)]
    assert len(found) == len(lines)
    for got, line in zip(found, lines, strict=True):
        assert (got["id"], got["input"]) == (str(line["id"]), line["input"])
        assert examples.answers(got) == examples.answers(line)
        # The tasks' own fields are not read, and -1 says no more than nothing.
        wanted = [
            {k: v for k, v in p.items() if k != "meta" and v != -1}
            for p in examples.provenance(line)
        ]
        assert examples.provenance(got) == wanted


PLACE = {"wikipedia_id": "7", "title": "T", "bleu_score": -1.0}


@pytest.mark.parametrize(
    ("outputs", "read"),
    [
        (
            [{"answer": "x", "provenance": [PLACE]}],
            [{"answer": "x", "provenance": [{"wikipedia_id": "7", "title": "T"}]}],
        ),
        # How pandas writes null.
        (
            [{"answer": "x", "provenance": [{**PLACE, "bleu_score": float("nan")}]}],
            [{"answer": "x", "provenance": [{"wikipedia_id": "7", "title": "T"}]}],
        ),
        ([{"answer": "x"}], [{"answer": "x", "provenance": []}]),
        ([{"provenance": [PLACE]}], [{"provenance": [{"wikipedia_id": "7", "title": "T"}]}]),
    ],
)
def test_tables_with_fewer_fields_are_read(tmp_path, outputs, read):
    path = tmp_path / "dev.parquet"
    row = {"id": "a", "input": "who", "output": outputs}
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert [line["output"] for line in examples.read_examples(path)] == [read]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["x"], "list of objects in `output`"),
        ('[{"answer": "x"}]', "list of objects in `output`"),
        ({"answer": "x"}, "list of objects in `output`"),
        ([{"answer": "x", "provenance": ["7"]}], "list of objects in `provenance`"),
        ([{"answer": "x", "provenance": [None, PLACE]}], "list of objects in `provenance`"),
        ([{"provenance": [{"start_paragraph_id": "3"}]}], "number or null in `start_paragraph_id`"),
    ],
)
def test_tables_of_other_types_are_rejected_by_row(tmp_path, outputs, message):
    path = tmp_path / "dev.parquet"
    row = {"id": "a", "input": "who", "output": outputs}
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    with pytest.raises(ValueError, match=f"dev.parquet:1: .*{message}"):
        list(examples.read_examples(path))


def test_files_of_another_kind_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="No file: .*absent.parquet"):
        list(read_parquet(tmp_path / "absent.parquet"))
    (tmp_path / "text.parquet").write_text("{}")
    with pytest.raises(ValueError, match="text.parquet is not Parquet"):
        list(read_parquet(tmp_path / "text.parquet"))
    parquet.write_table(pyarrow.table({"id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="column input, output; .* id\\. .* id, input"):
        list(read_parquet(tmp_path / "other.parquet"))


def test_damage_inside_a_file_is_reported(tmp_path):
    path = tmp_path / "dev.parquet"
    table = pyarrow.table({"id": ["a" * 999, "b"], "input": ["x" * 999, "y"], "output": [[], []]})
    parquet.write_table(table, path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[8:200] = b"\xff" * 192
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="dev.parquet .*damaged after row 0: .*Copy it again"):
        list(read_parquet(path))


def test_a_missing_pyarrow_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="x.parquet: .*pyarrow"):
        list(read_parquet("x.parquet"))


def test_rows_come_in_order_over_batches(tmp_path):
    path = tmp_path / "many.parquet"
    parquet.write_table(pyarrow.table({"id": list(range(3000)), "x": [0] * 3000}), path)
    assert [row["id"] for row in read_rows(path, ("id",))] == list(range(3000))
