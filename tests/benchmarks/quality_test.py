"""The benchmarks of quality ask the shipped model, and compare what belongs together."""

import json

import pytest

pytest.importorskip("seqio")

from benchmarks import codec_quality, fast_modes
from benchmarks.questions import LENGTHS
from glimmer_jax import shipped
from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.pydocs.questions import TASKS
from glimmer_jax.vocabulary import Vocabulary

VERBS = ("open", "close", "read", "write", "find", "split", "join", "sort", "copy", "move")
COUNT = LENGTHS["passages"][0]


@pytest.fixture
def data(tmp_path):
    vocabulary = Vocabulary("pydocs")
    records = [
        {
            "id": i,
            "title": f"tool.{verb}",
            "text": f"tool.{verb}(path) Return how to {verb} a file.",
        }
        for i, verb in enumerate(VERBS[:COUNT])
    ]
    write_passages(
        tmp_path / "passages",
        records,
        vocabulary.encode,
        vocabulary.fingerprint,
        64,
        vocab_size=vocabulary.vocab_size,
        source="test",
    )
    (tmp_path / "retrieved").mkdir()
    for task in TASKS:
        lines = [
            {
                "id": f"{task}/{number}",
                "input": f"Return how to {VERBS[number]} a file",
                "output": [
                    {
                        "answer": f"tool.{VERBS[number]}",
                        "provenance": [
                            {"wikipedia_id": f"tool.{VERBS[number]}", "bleu_score": 1.0}
                        ],
                    }
                ],
                "meta": {},
                "retrieved": [
                    {"id": i, "score": float(-i), "gold": i == number} for i in range(COUNT)
                ],
            }
            for number in range(3)
        ]
        text = "".join(json.dumps(one) + "\n" for one in lines)
        (tmp_path / "retrieved" / f"{task}-test.jsonl").write_text(text)
    return tmp_path


def test_fast_modes_are_compared_with_float32(data, tmp_path, capsys):
    out = tmp_path / "out.json"
    checkpoint = shipped.CHECKPOINTS / "pydocs_glimmer.safetensors"
    fast_modes.main(
        ["--json", str(out), "--data", str(data), "--checkpoint", f"glimmer={checkpoint}"]
    )
    exact, fast = json.loads(out.read_text())
    assert [exact["operands"], fast["operands"]] == ["float32", "bfloat16"]
    assert exact["nats_per_token"]["difference"] == 0 == exact["exact_match"]["difference"]
    # Rounded operands are another computation, and nearly the same.
    assert 0 < abs(fast["nats_per_token"]["difference"]) < 0.1
    assert exact["exact_match"]["n"] == 9 and set(exact["tasks"]) == set(TASKS)
    # The question is told in the passage's words, and the passage comes with it.
    assert exact["tasks"] == dict.fromkeys(TASKS, 1.0)
    assert "n = 9 questions" in capsys.readouterr().out


def test_codecs_are_compared_with_bf16(data, tmp_path):
    out = tmp_path / "out.json"
    codec_quality.main(["--json", str(out), "--data", str(data), "--codecs", "bf16,int8"])
    plain, small = json.loads(out.read_text())
    assert (plain["codec"], plain["bytes_per_token"]) == ("bf16", 256)
    assert (small["codec"], small["bytes_per_token"]) == ("int8", 148)  # with a scale and outliers
    assert plain["nats_per_token"]["difference"] == 0 < small["relative_rms"] < 0.02
    assert 0 < abs(small["nats_per_token"]["difference"]) < 0.1
