"""Reading a store, and rejecting stores that are damaged or do not fit."""

import contextlib
import json

import ml_dtypes
import numpy as np
import pytest

from glimmer_jax import main as command_line
from glimmer_jax.corpus.ids import id_number
from glimmer_jax.memory import manifest
from glimmer_jax.memory.maintain import inspect, verify
from glimmer_jax.memory.manifest import DamagedStore, EncodeProgram, Layout, Manifest
from glimmer_jax.memory.store import MemoryStore
from tests import damage


def _expected(tiny, passages, row, length):
    """States of one passage as the group it was encoded in gives them: rows are independent."""
    tokens = passages.tokens([row], length)
    return np.asarray(tiny.encode(tokens)[0]["states"])[0]


def test_round_trip_is_bit_exact_and_zero_padded(tiny, tiny_store):
    passages = tiny.TinyPassages()
    store = MemoryStore.open(tiny_store)
    rows = np.array([22, 0, -1, 7, 8, 9, 7])
    arrays, lengths = store.read(rows, 16)
    np.testing.assert_array_equal(
        lengths, [0 if r < 0 else len(passages.all_tokens[r]) for r in rows]
    )
    assert arrays["states"].dtype.name == "bfloat16" and arrays["states"].shape == (7, 16, 8)
    for i, row in enumerate(rows):
        n = lengths[i]
        if n:
            # Padded to the bucket it was built in, as the sum of a row depends on nothing else.
            expected = _expected(tiny, passages, row, next(b for b in (4, 8, 12) if b >= n))[:n]
            np.testing.assert_allclose(
                arrays["states"][i, :n].astype(np.float32), expected.astype(np.float32), rtol=0.02
            )
        assert not arrays["states"][i, n:].view(np.uint16).any()
    np.testing.assert_array_equal(arrays["states"][3], arrays["states"][6])


def test_round_trip_keeps_every_bit_of_bfloat16(tiny, tmp_path):
    patterns = np.random.default_rng(0).integers(0, 2**16, (64, 12, 8)).astype(np.uint16)
    exponent = (patterns >> 7) & 0xFF
    patterns = np.where(exponent == 0xFF, 0x8000, patterns).astype(np.uint16)  # -0.0, not NaN

    def encode(tokens):
        rows = tokens[:, 0] % 64
        states = patterns[rows, : tokens.shape[1]].view(ml_dtypes.bfloat16)
        return {"states": states}, np.ones(tokens.shape, bool)

    passages = tiny.TinyPassages()
    tiny.build_tiny(tmp_path / "s", encode=encode, reference=None)
    arrays, lengths = MemoryStore.open(tmp_path / "s").read(np.arange(len(passages)), 12)
    for row, n in enumerate(lengths):
        wanted = patterns[passages.all_tokens[row][0] % 64, :n]
        np.testing.assert_array_equal(arrays["states"][row, :n].view(np.uint16), wanted)


def test_unknown_ids_are_reported_or_masked(tiny, tiny_store):
    passages, store = tiny.TinyPassages(), MemoryStore.open(tiny_store)
    ids = passages.ids[[[3, 22], [0, 3]]]
    np.testing.assert_array_equal(store.rows(ids), [[3, 22], [0, 3]])
    np.testing.assert_array_equal(store.rows(np.array([-1])), [-1])
    np.testing.assert_array_equal(
        store.rows(np.array([7, -1, passages.ids[5]]), "mask"), [-1, -1, 5]
    )
    with pytest.raises(ValueError, match=r"not in the memory store .*: 7, 8 and 1 string id"):
        store.rows(np.array([8, 7, passages.ids[0], id_number("doc-1")]))
    with pytest.raises(ValueError, match="'error' or 'mask'"):
        store.rows(ids, "ignore")


def test_rows_and_lengths_out_of_range_are_rejected(tiny_store):
    store = MemoryStore.open(tiny_store)
    with pytest.raises(ValueError, match="-1 .* 22; got 23 to 23"):
        store.read(np.array([23]), 12)
    with pytest.raises(ValueError, match="TASK_FEATURE_LENGTHS .*11 .*12"):
        store.read(np.arange(23), 11)


def test_titles_cover_the_corpus(tiny, tiny_store):
    store, passages = MemoryStore.open(tiny_store), tiny.TinyPassages()
    titles = [title for entry in store.manifest.shards for title in store.titles(entry)]
    assert titles == [passages.title(row) for row in range(23)]


def test_padding_is_not_on_disk(tiny, tmp_path):
    passages = tiny.TinyPassages(count=200)
    passages.all_tokens[7] = passages.all_tokens[7][:1]
    tiny.build_tiny(tmp_path / "s", passages, layout=Layout(100, 16))
    store = MemoryStore.open(tmp_path / "s")
    real = sum(map(len, passages.all_tokens))
    data = (tmp_path / "s").glob("shards/*/states/c/0/0")
    size = sum(file.stat().st_size for file in data)
    payload = real * tiny.EMB_DIM * 2
    # Beyond the payload: two last chunks filled up, and 4 + 16 bytes of checksum and index a chunk.
    chunks = real // 16 + 4
    assert payload <= size <= payload + 2 * 16 * tiny.EMB_DIM * 2 + 20 * chunks + 8
    assert size < len(passages) * tiny.MAX_LENGTH * tiny.EMB_DIM * 2
    assert store.manifest.num_tokens == real


def test_inspect_summarises_the_store(tiny_store):
    summary = json.loads(json.dumps(inspect(MemoryStore.open(tiny_store))))
    assert summary["passages"] == 23 and summary["shards"] == 4 and summary["codec"] == "bf16"
    assert 0 < summary["codec_error"]["relative_rms"] < 0.004
    assert "rows=4" in summary["programs"][0]


@pytest.mark.fault
def test_another_encoder_or_vocabulary_is_rejected_with_both_names(tiny_store):
    MemoryStore.open(tiny_store, "sha256:e1", "sha256:v1")
    with pytest.raises(ValueError, match="encoder sha256:e1, .*encoder is sha256:x"):
        MemoryStore.open(tiny_store, "sha256:x")
    with pytest.raises(ValueError, match="vocabulary sha256:v1, .* vocabulary is sha256:y"):
        MemoryStore.open(tiny_store, None, "sha256:y")


def test_another_codec_is_rejected_and_memory_codec_reported(tiny_store):
    MemoryStore.open(tiny_store, codec="bf16")
    with pytest.raises(ValueError, match="MEMORY_CODEC is 'int8'.*'bf16'"):
        MemoryStore.open(tiny_store, codec="int8")


def test_other_passages_are_rejected_with_both_fingerprints(tiny_store):
    store = MemoryStore.open(tiny_store)
    store.check_passages("sha256:p1")
    with pytest.raises(ValueError, match="sha256:p1.*sha256:p2"):
        store.check_passages("sha256:p2")


@pytest.mark.fault
def test_a_sample_of_shards_is_verified(copied_store):
    for name in ("000000", "000001"):
        _states(copied_store, name).unlink()
    store = MemoryStore.open(copied_store)
    assert verify(store.path, 2) == ["shards/000000/states/c/0/0 is missing"]
    assert len(verify(store.path, 4)) == len(verify(store.path, 9)) == 2
    with pytest.raises(ValueError, match="VERIFY_SHARDS must be at least 1, got 0"):
        verify(store.path, 0)


def test_a_shard_does_not_record_its_position(tiny_store):
    value = json.loads((tiny_store / "shards" / "000002" / "shard.json").read_bytes())
    assert "first_row" not in value and "000002" not in json.dumps(value)
    assert not {"shard_passages", "chunk_tokens"} & value["identity"].keys()


@pytest.mark.fault
def test_an_unfinished_build_is_rejected(copied_store):
    (copied_store / "manifest.json").unlink()
    with pytest.raises(ValueError, match="rerun .*build_memory"):
        MemoryStore.open(copied_store)


def _states(store_path, shard="000001"):
    return store_path / "shards" / shard / "states" / "c" / "0" / "0"


@pytest.mark.fault
@pytest.mark.parametrize("position", [3, 100, -30])
def test_bit_flip_is_caught_on_read_and_by_verify(copied_store, position):
    assert verify(copied_store) == []
    data = bytearray(_states(copied_store).read_bytes())
    data[position] ^= 4
    _states(copied_store).write_bytes(data)
    store = MemoryStore.open(copied_store)
    with pytest.raises(DamagedStore, match="Shard 000001 .*action=repair"):
        store.read(np.arange(23), 12)
    assert verify(store.path) == [
        "shards/000001/states/c/0/0 has been changed: its SHA-256 differs"
    ]


@pytest.mark.fault
def test_missing_shard_file_is_an_error_not_zeros(copied_store):
    _states(copied_store).unlink()
    store = MemoryStore.open(copied_store)
    with pytest.raises(DamagedStore, match="000001"):
        store.read(np.array([7]), 12)
    store.read(np.array([0]), 12)
    assert verify(store.path) == ["shards/000001/states/c/0/0 is missing"]


@pytest.mark.fault
def test_truncated_file_and_changed_record_are_found(copied_store):
    data = _states(copied_store).read_bytes()
    _states(copied_store).write_bytes(data[:-1])
    record = copied_store / "shards" / "000002" / "shard.json"
    record.write_bytes(record.read_bytes() + b" ")
    (copied_store / "shards" / "000003" / "shard.json").unlink()
    problems = verify(copied_store)
    assert [problem.split(" ", 1)[1] for problem in problems] == [
        f"has {len(data) - 1} bytes instead of {len(data)}",
        "has been changed: its SHA-256 differs",
        "is missing",
    ]


@pytest.mark.fault
def test_a_file_of_a_damaged_size_is_not_read(copied_store):
    states = _states(copied_store)
    size = states.stat().st_size
    with states.open("r+b") as file:
        file.truncate(2**42)
    (problem,) = verify(copied_store)
    assert problem.endswith(f"has {2**42} bytes instead of {size}")


@pytest.mark.fault
@pytest.mark.parametrize("name", ["ids", "offsets"])
def test_damaged_index_is_caught_on_open(copied_store, name):
    file = copied_store / "shards" / "000000" / name / "c" / "0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedStore, match="Shard 000000"):
        MemoryStore.open(copied_store)


def _rewrite_manifest(path, change):
    """Changes the manifest and signs it again, as an attacker or a bug would."""
    value = json.loads((path / "manifest.json").read_bytes())
    del value["sha256"]
    change(value)
    value["sha256"] = manifest._self_checksum(value)
    (path / "manifest.json").write_text(json.dumps(value))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["shards"][0].update(name="../../x"), "outside the store"),
        (lambda v: v["shards"][0].update(name="/etc"), "outside the store"),
        (lambda v: v["shards"][0].update(passages=-6), "impossible number"),
        (lambda v: v["shards"][0].update(tokens=2**70), "impossible number"),
        (lambda v: v["shards"][1].update(first_row=5), "entry of shard .* is invalid"),
        (lambda v: v["shards"][1].update(layout=-1), "entry of shard .* is invalid"),
        (lambda v: v["shards"][1].update(program=1), "entry of shard .* is invalid"),
        (lambda v: v.update(withdrawn=[3, 3]), "withdraws rows"),
        (lambda v: v.update(withdrawn=[23]), "withdraws rows"),
        (lambda v: v.update(withdrawn=[-1]), "impossible number"),
        (lambda v: v.update(num_passages=22), "22 passages .* 23 "),
        (lambda v: v.pop("longest"), "cannot be parsed"),
    ],
)
def test_an_inconsistent_manifest_is_rejected(copied_store, change, message):
    _rewrite_manifest(copied_store, change)
    with pytest.raises(DamagedStore, match=message):
        MemoryStore.open(copied_store)


@pytest.mark.fault
def test_another_format_version_is_rejected(copied_store):
    _rewrite_manifest(copied_store, lambda v: v.update(format_version=1))
    with pytest.raises(ValueError, match="format version 1; .*version 4"):
        MemoryStore.open(copied_store)


@pytest.mark.fault
def test_a_changed_or_truncated_manifest_is_rejected(copied_store):
    file = copied_store / "manifest.json"
    text = file.read_text()
    file.write_text(text.replace("sha256:e1", "sha256:e2"))
    with pytest.raises(DamagedStore, match="changed since it was written"):
        MemoryStore.open(copied_store)
    for cut in (text[:50], "[]", "{}", ""):
        file.write_text(cut)
        with pytest.raises(DamagedStore, match="cannot be parsed"):
            MemoryStore.open(copied_store)


@pytest.mark.fault
def test_hostile_json_is_damage_that_names_its_file():
    for parse in (Manifest.from_bytes, manifest.Record.from_bytes):
        for text in damage.JSON_TEXTS:
            with pytest.raises(DamagedStore, match="here cannot be parsed"):
                parse(text.encode("utf-8", "surrogatepass"), "here")


@pytest.mark.fault
@pytest.mark.parametrize("name", ["manifest.json", "shards/000000/shard.json"])
def test_signed_fields_of_another_type_are_reported(copied_store, name):
    file = copied_store / name
    value = json.loads(file.read_bytes())
    del value["sha256"]
    for container, key in list(damage.places(value)):
        before = container[key]
        for wrong in (None, [], "x", {"x": 1}, 10**400):
            container[key] = wrong
            signed = json.dumps({**value, "sha256": manifest._self_checksum(value)}).encode()
            with contextlib.suppress(ValueError):  # Values that nothing computes with pass.
                if name != "manifest.json":
                    manifest.Record.from_bytes(signed, name)
                    continue
                file.write_bytes(signed)
                store = MemoryStore.open(copied_store)
                store.read(np.arange(len(store)), 12)
                inspect(store)
        container[key] = before


@pytest.mark.fault
@pytest.mark.parametrize("kind", damage.SPECIAL_FILES)
@pytest.mark.parametrize(
    "name", ["manifest.json", "shards/000001/shard.json", "shards/000001/titles/c/0", "states"]
)
def test_what_is_no_file_is_rejected_without_blocking(copied_store, kind, name):
    path = _states(copied_store) if name == "states" else copied_store / name
    damage.SPECIAL_FILES[kind](path)
    with pytest.raises((ValueError, OSError)) as error:  # noqa: PT012
        store = MemoryStore.open(copied_store, cache_bytes=0)
        store.read(np.arange(len(store)), 12)
        for shard in store.manifest.shards:
            store.titles(shard)
    assert command_line._classify(error.value)[1] == 2


@pytest.mark.fault
def test_a_record_that_names_files_elsewhere_is_rejected(tiny_store):
    value = json.loads((tiny_store / "shards" / "000000" / "shard.json").read_bytes())
    del value["sha256"]
    value["files"]["../../../etc/passwd"] = [1, "0"]
    value["sha256"] = manifest._self_checksum(value)
    with pytest.raises(DamagedStore, match="outside its shard"):
        manifest.Record.from_bytes(json.dumps(value).encode(), "shard.json")


def test_manifest_round_trips(tiny_store):
    data = (tiny_store / "manifest.json").read_bytes()
    assert Manifest.from_bytes(data, "m").to_bytes() == data


def test_program_is_checked():
    with pytest.raises(ValueError, match="BATCH_SIZE .*at least 1.*0"):
        EncodeProgram(0, (4,), "float32", None, "cpu", "0")
    with pytest.raises(ValueError, match="increasing and positive"):
        EncodeProgram(1, (8, 4), "float32", None, "cpu", "0")
