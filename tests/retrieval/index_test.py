"""The index: what it holds, stopped and started, and what is refused."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax.memory.build_plan import Builders
from glimmer_jax.retrieval import index as indexes
from glimmer_jax.retrieval.build_index import build_index, identity_of
from glimmer_jax.retrieval.index import Index
from glimmer_jax.retrieval.text_encoder import passage_text
from glimmer_jax.runtime.preemption import STOP, StopRequested
from tests.retrieval import tiny_gtr

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gtr(tmp_path_factory):
    return tiny_gtr.write(tmp_path_factory.mktemp("gtr"))


@pytest.fixture(scope="module")
def encoder(gtr):
    return tiny_gtr.encoder(gtr)


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    return tiny_gtr.write_corpus(tmp_path_factory.mktemp("corpus") / "passages")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, passages, encoder):
    """Folder of a finished index of 11 passages in shards of 3; not to be changed."""
    path = tmp_path_factory.mktemp("index") / "index"
    build_index(path, passages, encoder, shard_passages=3)
    return path


@pytest.fixture
def copy(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished, tmp_path / "copy"))


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_rows_are_the_vectors_of_the_passages_texts(finished, passages, encoder):
    index = Index.open(finished, identity_of(passages, encoder))
    texts = [passage_text(record) for record in passages.records()]
    assert texts[3] == "page 1 thing number 111"
    want = encoder.encode(encoder.tokenize(texts))
    assert len(index) == 11 and index.vector_dim == tiny_gtr.VECTOR_DIM
    np.testing.assert_allclose(index.read(0, 11), want, atol=2e-3)
    np.testing.assert_array_equal(index.read(2, 7), index.read(0, 11)[2:7])
    assert index.verify() == []


def test_long_texts_are_cut_as_the_published_encoder_cuts_them(encoder):
    long = encoder.tokenize(["one two three four five six seven eight nine ten " * 9])
    assert encoder.cut(long) == 1 and encoder.cut(encoder.tokenize(["short"])) == 0
    most = tiny_gtr.MAX_LENGTH - 1
    np.testing.assert_array_equal(encoder.encode(long), encoder.encode([long[0][:most]]))
    assert np.abs(encoder.encode(long) - encoder.encode([long[0][: most - 1]])).max() > 1e-4


def test_vectors_do_not_depend_on_the_number_of_devices(gtr, encoder, passages):
    tokens = encoder.tokenize([passage_text(record) for record in passages.records()])
    one = tiny_gtr.encoder(gtr, devices=1)
    np.testing.assert_array_equal(one.encode(tokens), encoder.encode(tokens))


@pytest.mark.fault
def test_killed_and_started_again_it_equals_an_uninterrupted_one(
    gtr, encoder, passages, finished, tmp_path
):
    path, script = tmp_path / "index", str(pathlib.Path(__file__).parent / "dying_index.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, script, str(gtr), str(passages.path), str(path)], env=env, timeout=200
    )
    assert run.returncode == -9
    with pytest.raises(ValueError, match="no finished index"):
        Index.open(path)
    assert sorted(one.parent.name for one in path.rglob("shard.json")) == ["000000", "000001"]
    assert (path / "shards" / "000002" / "vectors" / "zarr.json").is_file()
    kept = (path / "shards" / "000001" / "shard.json").stat().st_mtime_ns
    build_index(path, passages, encoder, shard_passages=3)
    assert (path / "shards" / "000001" / "shard.json").stat().st_mtime_ns == kept
    assert files_of(path) == files_of(finished)


def test_asked_to_stop_it_keeps_what_is_finished(encoder, passages, tmp_path):
    STOP.request()
    with pytest.raises(StopRequested, match="before shard 000000 .* Run the same command again"):
        build_index(tmp_path, passages, encoder, shard_passages=3)
    assert files_of(tmp_path) == {}


def test_a_finished_index_is_opened_without_writing(copy, encoder, passages):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    # Whatever the shard size that is asked for now.
    assert len(build_index(copy, passages, encoder, shard_passages=5)) == 11
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_another_encoder_and_other_passages_are_refused_with_both_named(
    copy, encoder, passages, tmp_path
):
    other = tiny_gtr.encoder(tiny_gtr.write(tmp_path / "other", seed=1))
    mine, theirs = encoder.loaded.fingerprint, other.loaded.fingerprint
    message = re.escape(f"made with the encoder {mine}, and here it is {theirs}. Use the encoder")
    texts = tiny_gtr.write_corpus(tmp_path / "texts", word="thong")
    both = [identity_of(one, encoder).passages for one in (passages, texts)]
    assert both[0] != both[1]
    other_texts = re.escape(f"the passages {both[0]}, and here it is {both[1]}.")
    for unfinished in (False, True):
        if unfinished:
            (copy / "manifest.json").unlink()
        with pytest.raises(ValueError, match=message):
            build_index(copy, passages, other, shard_passages=3)
        with pytest.raises(ValueError, match=other_texts):
            build_index(copy, texts, encoder, shard_passages=3)
    with pytest.raises(ValueError, match=r"000000 holds 3 passages, and this job puts 4 there"):
        build_index(copy, passages, encoder, shard_passages=4)


def test_several_processes_make_one_index(encoder, passages, finished, tmp_path):
    impatient = [Builders(i, 2, wait_seconds=0.0) for i in range(2)]
    with pytest.raises(
        StopRequested, match="2 shards of other builders are missing, the first 000000"
    ):
        build_index(tmp_path, passages, encoder, shard_passages=3, builders=impatient[1])
    build_index(tmp_path, passages, encoder, shard_passages=3, builders=impatient[0])
    assert files_of(tmp_path) == files_of(finished)
    # The second, started again, finds all of it.
    build_index(tmp_path, passages, encoder, shard_passages=3, builders=impatient[1])
    # Who has no shard left to make waits for the others all the same.
    (tmp_path / "manifest.json").unlink()
    build_index(tmp_path, passages, encoder, shard_passages=3, builders=impatient[0])
    assert files_of(tmp_path) == files_of(finished)


@pytest.mark.fault
def test_damage_is_noticed_and_one_shard_made_again(copy, encoder, passages, finished):
    path = copy / "shards" / "000001" / "vectors" / "c" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    index = Index.open(copy)
    assert index.verify() == ["000001: vectors/c/0/0 has been changed: its SHA-256 differs"]
    np.testing.assert_array_equal(index.read(0, 3), Index.open(finished).read(0, 3))
    with pytest.raises(ValueError, match="index .* is damaged: .*Delete the folder of that shard"):
        index.read(0, 11)
    path.write_bytes(data[:-7])
    build_index(copy, passages, encoder, shard_passages=3)
    assert files_of(copy) == files_of(finished)


@pytest.mark.fault
def test_damaged_and_foreign_files_are_named(copy, encoder, passages):
    record = copy / "shards" / "000002" / "shard.json"
    text = record.read_text()
    record.write_text(text.replace('"passages": 3', '"passages": 2'))
    assert "000002: its record is not the one" in Index.open(copy).verify()[0]
    manifest = copy / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(re.sub(r'"000002",\s+3', '"000002", 2', whole))
    with pytest.raises(
        ValueError, match=r"is damaged: its shards are .*\(3, 48\).*not .*\(2, 48\)"
    ):
        Index.open(copy)
    manifest.write_text(whole.replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(ValueError, match="has format version 9, this program reads 1"):
        Index.open(copy)
    manifest.write_text(whole[:50])
    with pytest.raises(ValueError, match="manifest.json is damaged.*whole shards are kept"):
        build_index(copy, passages, encoder, shard_passages=3)


def test_storage_that_does_not_answer_is_no_damage(finished, monkeypatch):
    index = Index.open(finished)
    error = index._failed(ValueError("PERMISSION_DENIED: Error reading"))
    assert isinstance(error, OSError) and "run the same command again" in str(error)


@pytest.mark.fault
def test_nan_names_the_passage(encoder, passages, tmp_path, monkeypatch):
    run = encoder._run
    monkeypatch.setattr(encoder, "_run", lambda tokens: run(tokens).at[0].set(jnp.nan))
    # The first row of the only batch is the shortest passage.
    with pytest.raises(ValueError, match=f"NaN or infinity for passage {passages.ids[0]}"):
        build_index(tmp_path, passages, encoder, shard_passages=2)
    assert indexes.read_manifest(indexes.folder.open_folder(tmp_path)) is None


def test_a_vocabulary_larger_than_the_embedding_is_refused(gtr):
    loaded = tiny_gtr.encoder(gtr).loaded
    t5 = type(loaded.t5)(**{**vars(loaded.t5), "vocab_size": 100})
    small = type(loaded)(**{**vars(loaded), "t5": t5})
    mesh = tiny_gtr.partitioning.make_mesh(tiny_gtr.partitioning.MeshConfig())
    with pytest.raises(ValueError, match="has 1948 pieces .* its embedding has 100 rows"):
        tiny_gtr.TextEncoder(small, mesh, 2)
