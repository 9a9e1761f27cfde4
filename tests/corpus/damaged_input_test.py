"""Damaged corpus files of each format: our own error, or passages."""

import gzip
import json
import random

import pytest

from glimmer_jax import main as command_line
from glimmer_jax.corpus.reading import Reading, read_passages

pytestmark = pytest.mark.fault
RECORDS = [
    {"id": f"p{i}", "title": f"title {i}", "text": f"the text of passage {i} " * 20, "page": f"{i}"}
    for i in range(30)
]


def write(path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    text = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    if path.suffix == ".parquet":
        # Row groups of their own, so that damage may lie in any of them.
        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=7)
    else:
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return "parquet" if path.suffix == ".parquet" else "passages"


def damaged(data, draw):
    data = bytearray(data)
    kind = draw.choice(["flip", "flip", "flips", "truncate", "zero", "insert"])
    place = draw.randrange(len(data))
    if kind == "truncate":
        return data[:place]
    if kind == "insert":
        return data[:place] + draw.randbytes(draw.randrange(1, 9)) + data[place:]
    for offset in range({"flip": 1, "flips": 40, "zero": 60}[kind]):
        at = place + offset if kind == "zero" else draw.randrange(len(data))
        if at < len(data):
            data[at] = 0 if kind == "zero" else data[at] ^ (1 << draw.randrange(8))
    # Parquet's metadata is at the end, and is the part with most to get wrong.
    if draw.random() < 0.5:
        at = len(data) - 1 - draw.randrange(min(len(data), 700))
        data[at] ^= 1 << draw.randrange(8)
    return data


def attack(path, seed, count):
    format, draw = write(path), random.Random(seed)
    intact, rejected = path.read_bytes(), 0
    for number in range(count):
        path.write_bytes(damaged(intact, draw))
        try:
            passages = list(read_passages([str(path)], Reading(format)))
        except ValueError as error:
            rejected += 1
            named = command_line._is_ours(error) and str(path) in str(error)
        else:
            named = all(isinstance(passage["text"], str) for passage in passages)
        assert named, (number, seed)
    assert rejected > count // 5


NAMES = ("a.jsonl", "a.jsonl.gz", "a.parquet")


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_rejected_by_name(tmp_path, name):
    attack(tmp_path / name, 0, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_rejected_by_name_300_times(tmp_path, name):
    attack(tmp_path / name, 1, 300)
