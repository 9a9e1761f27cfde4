"""The dense index: a memory store with one vector per passage."""

import dataclasses
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
from glimmer_jax.memory.maintain import verify
from glimmer_jax.memory.manifest import DamagedStore
from glimmer_jax.retrieval.build_index import build_index, index_encoder
from glimmer_jax.retrieval.index import Index, texts_fingerprint
from glimmer_jax.retrieval.text_encoder import dense_text
from glimmer_jax.runtime.preemption import STOP, StopRequested
from tests import damage
from tests.retrieval import tiny_gtr
from tests.vocabularies import train_sentencepiece

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


def test_rows_are_the_vectors_of_the_passages(finished, passages, encoder):
    index = Index.open(
        finished, index_encoder(encoder).identity, texts_fingerprint(passages.manifest)
    )
    texts = [dense_text(record) for record in passages.records()]
    assert texts[3] == "page 1 thing number 111"
    want = encoder.encode(encoder.tokenize(texts))
    assert len(index) == 11 and index.vector_dim == tiny_gtr.VECTOR_DIM
    np.testing.assert_allclose(index.read(0, 11), want, atol=2e-3)
    np.testing.assert_array_equal(index.read(2, 7), index.read(0, 11)[2:7])
    np.testing.assert_array_equal(index.store.ids, passages.ids)
    assert verify(finished) == []


def test_long_texts_are_truncated_as_by_the_published_encoder(encoder):
    long = encoder.tokenize(["one two three four five six seven eight nine ten " * 9])
    most = tiny_gtr.MAX_LENGTH - 1
    np.testing.assert_array_equal(encoder.encode(long), encoder.encode([long[0][:most]]))
    assert np.abs(encoder.encode(long) - encoder.encode([long[0][: most - 1]])).max() > 1e-4


def test_vectors_do_not_depend_on_the_number_of_devices(gtr, encoder, passages):
    tokens = encoder.tokenize([dense_text(record) for record in passages.records()])
    one = tiny_gtr.encoder(gtr, devices=1)
    np.testing.assert_array_equal(one.encode(tokens), encoder.encode(tokens))


@pytest.mark.fault
def test_a_killed_and_resumed_index_equals_an_uninterrupted_one(
    gtr, encoder, passages, finished, tmp_path
):
    path, script = tmp_path / "index", str(pathlib.Path(__file__).parent / "dying_index.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, script, str(gtr), str(passages.path), str(path)], env=env, timeout=200
    )
    assert run.returncode == -9
    with pytest.raises(ValueError, match="No finished memory store"):
        Index.open(path)
    assert sorted(one.parent.name for one in path.rglob("shard.json")) == ["000000", "000001"]
    assert (path / "shards" / "000002" / "states" / "zarr.json").is_file()
    kept = (path / "shards" / "000001" / "shard.json").stat().st_mtime_ns
    build_index(path, passages, encoder, shard_passages=3)
    assert (path / "shards" / "000001" / "shard.json").stat().st_mtime_ns == kept
    assert files_of(path) == files_of(finished)


def test_a_requested_stop_keeps_finished_shards(encoder, passages, tmp_path):
    STOP.request()
    with pytest.raises(StopRequested, match="Rerun the same command"):
        build_index(tmp_path, passages, encoder, shard_passages=3)
    assert not (tmp_path / "shards").exists()


def test_a_finished_index_is_opened_without_writing(copy, encoder, passages):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    # Independent of the shard size that is requested now.
    assert len(build_index(copy, passages, encoder, shard_passages=5)) == 11
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_another_encoder_and_other_passages_are_rejected(copy, encoder, passages, tmp_path):
    other = tiny_gtr.encoder(tiny_gtr.write(tmp_path / "other", seed=1))
    mine, theirs = encoder.loaded.fingerprint, other.loaded.fingerprint
    texts = tiny_gtr.write_corpus(tmp_path / "texts", word="thong")
    here, there = (texts_fingerprint(folder.manifest) for folder in (passages, texts))
    assert here != there
    with pytest.raises(ValueError, match=f"(?s){here}.*{there}"):
        build_index(copy, texts, encoder, shard_passages=3)
    for unfinished in (False, True):
        if unfinished:
            (copy / "manifest.json").unlink()
        with pytest.raises(ValueError, match=f"encoder_fingerprint {mine} .now {theirs}"):
            build_index(copy, passages, other, shard_passages=3)
    with pytest.raises(ValueError, match="000000/shard.json .*other passages"):
        build_index(copy, texts, encoder, shard_passages=3)
    with pytest.raises(ValueError, match="shard_passages=3.*shard_passages=4"):
        build_index(copy, passages, encoder, shard_passages=4)


def test_several_processes_build_one_index(encoder, passages, finished, tmp_path):
    impatient = [Builders(i, 2, wait_seconds=0.0) for i in range(2)]
    with pytest.raises(StopRequested, match="not completed by the first builder"):
        build_index(tmp_path, passages, encoder, shard_passages=3, builders=impatient[1])
    build_index(tmp_path, passages, encoder, shard_passages=3, builders=impatient[0])
    assert files_of(tmp_path) == files_of(finished)
    # The second builder, rerun, finds a finished index.
    build_index(tmp_path, passages, encoder, shard_passages=3, builders=impatient[1])
    (tmp_path / "manifest.json").unlink()
    build_index(tmp_path, passages, encoder, shard_passages=3, builders=impatient[0])
    assert files_of(tmp_path) == files_of(finished)
    # A shard of the first builder is gone: the second waits for its repair.
    shutil.rmtree(tmp_path / "shards" / "000000")
    with pytest.raises(StopRequested, match="not completed by the first builder"):
        build_index(tmp_path, passages, encoder, shard_passages=3, builders=impatient[1])
    build_index(tmp_path, passages, encoder, shard_passages=3, builders=impatient[0])
    assert files_of(tmp_path) == files_of(finished)


@pytest.mark.fault
def test_damage_is_noticed_and_one_shard_is_rebuilt(copy, encoder, passages, finished):
    path = copy / "shards" / "000001" / "states" / "c" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    index = Index.open(copy)
    assert verify(copy) == ["shards/000001/states/c/0/0 has been changed: its SHA-256 differs"]
    np.testing.assert_array_equal(index.read(0, 3), Index.open(finished).read(0, 3))
    with pytest.raises(DamagedStore, match="Shard 000001 .*delete .*shards/000001"):
        index.read(0, 11)
    path.write_bytes(data[:-7])
    build_index(copy, passages, encoder, shard_passages=3)
    assert files_of(copy) == files_of(finished)


@pytest.mark.fault
def test_a_damaged_record_or_manifest_is_rebuilt(copy, encoder, passages, finished):
    for name in ("shards/000002/shard.json", "manifest.json"):
        (copy / name).write_bytes((copy / name).read_bytes()[:50])
        with pytest.raises(DamagedStore, match=name.rpartition("/")[2]):
            Index.open(copy)
        build_index(copy, passages, encoder, shard_passages=3)
        assert files_of(copy) == files_of(finished)


def _check_attacks(copy, older, encoder, passages, seed, count):
    identity, texts = index_encoder(encoder).identity, texts_fingerprint(passages.manifest)

    def content():
        index = Index.open(copy, identity, texts)
        return index.store.ids.tolist(), index.read(0, len(index)).tobytes()

    intact, raised = content(), 0
    for attack in damage.attacks(copy, seed=seed, count=count, older=older):
        try:
            assert content() == intact, attack
        except ValueError as error:
            message = str(error)
            assert re.search(r"shards/|Shard |manifest\.json|INDEX_DIR", message), (attack, message)
            raised += 1
    assert raised > count // 4


@pytest.fixture(scope="module")
def older(tmp_path_factory, passages):
    """Folder of an index of the same passages by another encoder."""
    folder = tmp_path_factory.mktemp("older")
    other = tiny_gtr.encoder(tiny_gtr.write(folder / "gtr", seed=1))
    build_index(folder / "index", passages, other, shard_passages=3)
    return folder / "index"


@pytest.mark.fault
def test_a_sample_of_attacks_is_never_silent(copy, older, encoder, passages):
    _check_attacks(copy, older, encoder, passages, seed=0, count=42)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_attacks_are_never_silent(copy, older, encoder, passages, seed):
    _check_attacks(copy, older, encoder, passages, seed, count=140)


@pytest.mark.fault
def test_nan_names_the_passage(encoder, passages, tmp_path, monkeypatch):
    run = encoder.run
    monkeypatch.setattr(encoder, "run", lambda tokens: run(tokens).at[0].set(jnp.nan))
    # The first row of the only batch is the shortest passage.
    with pytest.raises(ValueError, match=f"NaN or infinity .* {passages.ids[0]}"):
        build_index(tmp_path, passages, encoder, shard_passages=2)
    assert not (tmp_path / "manifest.json").exists()


def test_a_memory_of_tokens_is_not_an_index(tmp_path):
    sys.path.insert(0, str(ROOT / "tests" / "memory"))
    import tiny_memory

    tiny_memory.build_tiny(tmp_path)
    with pytest.raises(ValueError, match="INDEX_DIR .*not a dense index.*f16.*bf16"):
        Index.open(tmp_path)


@pytest.mark.parametrize("rows", [100, 1947, 2049])
def test_a_vocabulary_of_another_size_than_the_embedding_is_rejected(gtr, rows):
    loaded = tiny_gtr.encoder(gtr).loaded
    other = dataclasses.replace(loaded, t5=dataclasses.replace(loaded.t5, vocab_size=rows))
    mesh = tiny_gtr.partitioning.make_mesh(tiny_gtr.partitioning.MeshConfig())
    with pytest.raises(ValueError, match=f"has 1948 pieces.* the embedding has {rows} rows"):
        tiny_gtr.TextEncoder(other, mesh, 2)


def test_a_vocabulary_with_other_special_ids_is_rejected(gtr, tmp_path):
    loaded = tiny_gtr.encoder(gtr).loaded
    train_sentencepiece(tmp_path / "own.model", ["one two three"], vocab_size=30)
    vocabulary = (tmp_path / "own.model").read_bytes()
    t5 = dataclasses.replace(loaded.t5, vocab_size=128)
    other = dataclasses.replace(loaded, t5=t5, vocabulary=vocabulary)
    mesh = tiny_gtr.partitioning.make_mesh(tiny_gtr.partitioning.MeshConfig())
    with pytest.raises(ValueError, match="ENCODER_DIR.*pad_id=-1, eos_id=2 and unk_id=0"):
        tiny_gtr.TextEncoder(other, mesh, 2)
