"""The build job: stopped and started, refused where it must be, and right at the edges."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from glimmer_jax import partitioning
from glimmer_jax.memory import encoding, estimate, manifest
from glimmer_jax.memory.maintain import verify
from glimmer_jax.memory.manifest import Layout
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.runtime.preemption import STOP, StopRequested
from glimmer_jax.storage import folder
from glimmer_jax.storage.lease import WriterLock


def _run_and_die(path, die_at):
    script = pathlib.Path(__file__).parent / "tiny_memory.py"
    root = str(pathlib.Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, str(script), str(path), die_at], env=env, timeout=120, check=False
    ).returncode


@pytest.mark.fault
@pytest.mark.parametrize(
    ("die_at", "finished"),
    [
        ("encode", 2),
        ("fsync:000001/arrays", 1),
        ("rename:000001/arrays", 1),
        ("fsync:000001/shard.json", 1),
        ("rename:000001/shard.json", 1),
        ("fsync:manifest.json", 4),
        ("rename:manifest.json", 4),
        ("after:manifest.json", 4),
    ],
)
def test_a_killed_and_resumed_build_equals_an_uninterrupted_one(
    tiny, tiny_store, tmp_path, folder_bytes, die_at, finished
):
    path = tmp_path / "store"
    assert _run_and_die(path, die_at) == (-9 if die_at[0] in "ea" else -signal.SIGSYS)
    if die_at != "after:manifest.json":
        with pytest.raises(ValueError, match="No finished memory store"):
            MemoryStore.open(path)
    report = tiny.build_tiny(path)
    # The shard being written when the process died may or may not have been finished.
    assert report.skipped in (finished, finished - 1) and report.skipped + report.built == 4
    assert folder_bytes(path) == folder_bytes(tiny_store)


@pytest.mark.fault
@pytest.mark.parametrize("die_at", ["rename:versions/000001.json", "after:versions/000001.json"])
def test_a_killed_and_resumed_append_equals_an_uninterrupted_one(
    tiny, tmp_path, folder_bytes, die_at
):
    for name in ("killed", "whole"):
        path = tmp_path / name
        if name == "killed":
            assert _run_and_die(path, die_at) in (-9, -signal.SIGSYS)
            assert len(MemoryStore.open(path)) == 9
        else:
            tiny.build_tiny(path, tiny.part(range(9)))
        assert tiny.append_tiny(path, tiny.TinyPassages()).version == 2
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "whole")


@pytest.mark.fault
def test_sigterm_keeps_finished_shards_and_exits_42(tiny, tiny_store, tmp_path, folder_bytes):
    path = tmp_path / "store"
    assert _run_and_die(path, "sigterm") == 42
    assert not (path / "build.lock").exists()
    assert tiny.build_tiny(path).skipped == 2
    assert folder_bytes(path) == folder_bytes(tiny_store)


def test_a_build_polls_the_stop_signal(tiny, tmp_path):
    STOP.request()
    with pytest.raises(StopRequested, match="[Rr]erun the same command"):
        tiny.build_tiny(tmp_path / "s")


def test_rerunning_a_finished_build_changes_nothing(tiny, copied_store, folder_bytes):
    before = folder_bytes(copied_store)
    report = tiny.build_tiny(copied_store)
    assert (report.built, report.skipped) == (0, 4)
    assert folder_bytes(copied_store) == before


@pytest.mark.fault
def test_a_finished_build_on_read_only_storage_succeeds(tiny, copied_store, monkeypatch):
    def refuse(*args):
        raise OSError("Read-only file system")

    monkeypatch.setattr(folder, "write_file", refuse)
    monkeypatch.setattr(WriterLock, "__enter__", refuse)
    report = tiny.build_tiny(copied_store)
    assert (report.built, report.skipped, report.manifest.num_passages) == (0, 4, 23)


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["folder", "truncated", "file"])
def test_only_the_damaged_shard_is_rebuilt_with_the_same_bytes(
    tiny, tiny_store, copied_store, folder_bytes, damage
):
    data = copied_store / "shards" / "000001" / "states" / "c" / "0" / "0"
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:-7])
    else:
        data.unlink()
    if damage == "folder":
        (copied_store / "shards" / "000001" / "shard.json").unlink()
        (copied_store / "manifest.json").unlink()
    report = tiny.build_tiny(copied_store)
    assert (report.built, report.skipped) == (1, 3)
    assert folder_bytes(copied_store) == folder_bytes(tiny_store)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_fingerprint": "sha256:e2"}, r"encoder_fingerprint sha256:e1 \(now sha256:e2\)"),
        ({"vocabulary_fingerprint": "v2"}, r"vocabulary_fingerprint sha256:v1 \(now v2\)"),
        ({"codec": "f32"}, r"codec bf16 \(now f32\)"),
        ({"rows": 8}, r"program \(rows=4.*\(rows=8"),
        ({"dtype": "bfloat16"}, r" dtype=float32.* dtype=bfloat16"),
        ({"matmul_dtype": "bfloat16"}, r"matmul_dtype=None.*matmul_dtype=bfloat16"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_resuming_with_other_settings_is_rejected(tiny, copied_store, change, message, finished):
    if not finished:
        (copied_store / "manifest.json").unlink()
    with pytest.raises(ValueError, match=message):
        tiny.build_tiny(copied_store, **change)


@pytest.mark.fault
def test_other_passages_are_rejected(tiny, copied_store):
    other = tiny.TinyPassages()
    other.all_tokens[20] = other.all_tokens[20] + 1
    with pytest.raises(ValueError, match="000003.*other passages"):
        tiny.build_tiny(copied_store, other)
    with pytest.raises(ValueError, match="23 passages in 4 shards; .* 5"):
        tiny.build_tiny(copied_store, tiny.TinyPassages(count=30))


def test_another_layout_is_rejected(tiny, copied_store):
    (copied_store / "manifest.json").unlink()
    message = r"shard_passages=6, chunk_tokens=4.*\(shard_passages=6, chunk_tokens=8"
    with pytest.raises(ValueError, match=message):
        tiny.build_tiny(copied_store, layout=Layout(6, 8))


@pytest.mark.fault
def test_nan_does_not_hide_in_integers(tiny):
    states = jax.numpy.zeros((2, 3, 4)).at[1, 2, 3].set(jax.numpy.nan)
    _, finite = encoding.encode_states("bf16", states)
    assert not finite[1, 2] and finite.sum() == 5
    # The largest float32 is finite, but rounds to infinity.
    _, finite = encoding.encode_states("bf16", jax.numpy.full((1, 1, 4), 3.4028235e38))
    assert not finite.any()


def test_other_program_is_accepted_with_a_flag_and_recorded(tiny, copied_store):
    (copied_store / "shards" / "000002" / "shard.json").unlink()
    report = tiny.build_tiny(copied_store, rows=8, accept_other_program=True)
    assert [program.rows for program in report.manifest.programs] == [4, 8]
    assert [shard.program.rows for shard in report.manifest.shards] == [4, 4, 8, 4]


@pytest.mark.fault
def test_a_second_writer_is_rejected_and_the_holder_is_reported(tiny, tmp_path):
    path = tmp_path / "store"

    def encode(tokens):
        with pytest.raises(ValueError, match=f"by process {os.getpid()} on"):
            tiny.build_tiny(path)
        return tiny.encode(tokens)

    tiny.build_tiny(path, tiny.TinyPassages(count=2), encode=encode, reference=None)
    assert not (path / manifest.LOCK).exists()


@pytest.mark.fault
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_from_the_encoder_names_the_passage(tiny, tmp_path, bad):
    passages = tiny.TinyPassages()
    passages.all_tokens[9][0] = 99

    def encode(tokens):
        states = np.array(tiny.encode_states(tokens))
        states[tokens[:, 0] == 99, 0, 1] = bad
        # Values at padding are nobody's.
        states[tokens == 0] = np.nan
        return encoding.encode_states("bf16", jax.numpy.asarray(states))

    with pytest.raises(ValueError, match=f"NaN or infinity .* {passages.ids[9]}"):
        tiny.build_tiny(tmp_path / "s", passages, encode=encode, reference=None)
    assert not (tmp_path / "s" / "manifest.json").exists()


@pytest.mark.fault
@pytest.mark.parametrize("count", [0, 1, 6, 7])
def test_corpora_of_any_size(tiny, tmp_path, count):
    passages = tiny.TinyPassages(count=count)
    report = tiny.build_tiny(tmp_path / "s", passages)
    store = MemoryStore.open(tmp_path / "s")
    assert len(store) == count and report.built == -(-count // 6) and verify(store.path) == []
    np.testing.assert_array_equal(store.rows(passages.ids), np.arange(count))
    _, lengths = store.read(np.arange(count), 12)
    np.testing.assert_array_equal(lengths, passages.lengths(range(count)))


@pytest.mark.fault
def test_long_and_empty_passages(tiny, tmp_path):
    passages = tiny.TinyPassages(count=4, longest=30)
    passages.all_tokens[2] = passages.all_tokens[2][:0]
    lengths = passages.lengths(range(4))
    report = tiny.build_tiny(tmp_path / "s", passages)
    assert report.manifest.truncated == (lengths > 12).sum() > 0
    _, stored = MemoryStore.open(tmp_path / "s").read(np.arange(4), 12)
    np.testing.assert_array_equal(stored, np.minimum(lengths, 12))


def test_bytes_do_not_depend_on_the_number_of_devices(tiny, tiny_store, tmp_path, folder_bytes):
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=2, model=2), jax.devices()[:4])
    encode = encoding.bind_encoder(lambda _, tokens: tiny.encode_states(tokens), {}, mesh, "bf16")
    tiny.build_tiny(tmp_path / "s", encode=encode, devices=4)
    assert folder_bytes(tmp_path / "s") == folder_bytes(tiny_store)


@pytest.mark.fault
def test_bad_settings_are_rejected(tiny, tmp_path):
    passages = tiny.TinyPassages()
    with pytest.raises(ValueError, match="bucket .*max_length=12"):
        tiny.build_tiny(tmp_path, buckets=(4, 8))
    with pytest.raises(ValueError, match="must be at least 1; got 0, 4"):
        Layout(0, 4)
    with pytest.raises(ValueError, match="devices must be at least 1; got 0"):
        tiny.encoder(devices=0)
    passages.ids[3] = passages.ids[4]
    with pytest.raises(ValueError, match=f"unique.*{passages.ids[3]}"):
        tiny.build_tiny(tmp_path, passages)
    with pytest.raises(ValueError, match="codec, emb_dim and batch size"):
        tiny.build_tiny(tmp_path / "s", emb_dim=16, reference=None)


def test_progress_is_reported(tiny, tmp_path, caplog):
    with caplog.at_level("INFO", "glimmer_jax"):
        report = tiny.build_tiny(tmp_path / "s", matmul_bound=1e6)
    assert "memory: 23 of 23 passages" in caplog.text and "padding" in caplog.text
    assert f"{report.manifest.num_bytes / 1e6:.1f} MB written, 0s left" in caplog.text
    assert 0 < report.padding < 0.6 and report.tokens_per_s > 0
    assert report.fraction_of_peak == pytest.approx(report.tokens_per_s / 1e6)


def test_the_floor_is_what_all_devices_multiply_together(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(estimate.time, "monotonic", lambda: float(next(clock)))
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=2), jax.devices()[:2])
    # By this clock a product takes a second.
    assert estimate.matmul_rate(mesh, "bfloat16") == 2 * 512**3


def test_groups_are_of_similar_length_and_only_the_last_is_partial():
    lengths = np.array([9, 1, 5, 4, 12, 3, 2])
    found = encoding.groups(lengths, 3, (4, 8, 12))
    assert [group.positions.tolist() for group in found] == [[1, 6, 5], [3, 2, 0], [4]]
    assert [group.bucket for group in found] == [4, 12, 12]
    assert [len(call) for call in encoding.calls(found, 4)] == [1, 2]
    assert encoding.default_buckets(70) == (32, 64, 70)
    assert encoding.default_buckets(12) == (12,)
