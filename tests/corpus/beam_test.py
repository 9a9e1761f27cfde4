"""The pipeline gives what one process gives; it runs where Apache Beam is installed."""

import json
import os
import sys

import pytest

from glimmer_jax.corpus import beam
from glimmer_jax.corpus.files import find_files
from glimmer_jax.corpus.reading import Reading, read_passages
from glimmer_jax.corpus.report import Policy, Report


def line(number, text="word " * 7):
    page = {"wikipedia_id": str(number), "wikipedia_title": f"T{number}", "text": [text]}
    return json.dumps(page).encode() + b"\n"


@pytest.fixture
def corpus(tmp_path):
    """Two files with an empty page, a bad line and three repeated ids, one within a span."""
    (tmp_path / "a.json").write_bytes(
        b"".join(line(number, "word " * (number % 9)) for number in range(40)) + b"bad\n" + line(39)
    )
    repeated = line(40) + line(3) + b"\n" + line(40)
    (tmp_path / "b.json").write_bytes(repeated + b"".join(line(i) for i in range(50, 70)))
    return find_files(f"{tmp_path}/*.json")


def test_a_missing_beam_is_reported(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ValueError, match=r"pip install 'glimmer-jax\[beam\]'"):
        beam.write_passages(corpus, str(tmp_path / "out"), Reading("kilt", 5))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")  # Of Beam's own making.
def test_many_processes_give_what_one_gives(corpus, tmp_path):
    pytest.importorskip("apache_beam")
    reading, wanted = Reading("kilt", 5, Policy("skip", 4)), Report()
    alone = list(read_passages(corpus, reading, wanted))
    out = str(tmp_path / "out")
    paths, report = beam.write_passages(corpus, out, reading, span_bytes=500)
    assert len(paths) > 8 and paths == find_files(f"{out}/*.jsonl")
    assert list(read_passages(paths)) == alone
    assert report == wanted and report.skipped == 4

    # A rerun keeps the shards, and completes them after a kill while they were renamed.
    for part in (None, tmp_path / "out" / "unfinished"):
        before = os.stat(paths[0]).st_mtime_ns
        if part is not None:
            part.mkdir()
            os.unlink(paths[-1])
        assert beam.write_passages(corpus, out, reading, span_bytes=500) == (paths, report)
        assert (os.stat(paths[0]).st_mtime_ns == before) == (part is None)
    with pytest.raises(ValueError, match="out .*CORPUS="):
        beam.write_passages(corpus, out, reading)
    for strict in (Reading("kilt", 5), Reading("kilt", 5, Policy("skip", 3))):
        with pytest.raises(ValueError, match=r"\.json:\d+: ") as one:
            list(read_passages(corpus, strict))
        with pytest.raises(ValueError, match=r"\.json:\d+: ") as many:
            beam.write_passages(corpus, out, strict, span_bytes=500, overwrite=True)
        assert str(one.value) == str(many.value)
    # What failed has touched nothing.
    assert paths == find_files(f"{out}/*.jsonl")
    beam.write_passages(corpus[1:], out, Reading("kilt", 5, Policy("skip")), overwrite=True)
    assert len(find_files(f"{out}/*.jsonl")) == 1


@pytest.mark.fault
@pytest.mark.filterwarnings("ignore")
def test_a_truncated_file_fails_as_in_one_process(tmp_path):
    pytest.importorskip("apache_beam")
    import gzip

    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b"".join(map(line, range(99))))[:-30])
    reading = Reading("kilt", 5)
    with pytest.raises(ValueError, match="damaged or truncated") as one:
        list(read_passages([str(path)], reading))
    with pytest.raises(ValueError, match="damaged or truncated") as many:
        beam.write_passages([str(path)], str(tmp_path / "out"), reading)
    assert str(one.value) == str(many.value)
    assert not list((tmp_path / "out").iterdir())
