"""A finished store, changed: by versions, never under a reader."""

import json
import shutil

import numpy as np
import pytest

from glimmer_jax.memory import edit, encoding, estimate, maintain, manifest
from glimmer_jax.memory.build import BuildConfig
from glimmer_jax.memory.maintain import verify
from glimmer_jax.memory.manifest import Layout
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.t5 import T5Config
from glimmer_jax.runtime import progress
from glimmer_jax.runtime.preemption import STOP, StopRequested
from glimmer_jax.storage import folder


def _memory(store, ids, length=12):
    arrays, lengths = store.read(store.rows(ids), length)
    return arrays["states"].view(np.uint16), lengths


def test_append_adds_what_is_new_and_readers_keep_their_version(tiny, tmp_path):
    path, whole = tmp_path / "s", tiny.TinyPassages()
    tiny.build_tiny(path, tiny.part(range(9)))
    before = MemoryStore.open(path)
    seen = _memory(before, whole.ids[:9])
    made = tiny.append_tiny(path, whole)
    assert (made.version, made.num_passages, len(made.shards)) == (2, 23, 2 + 3)
    after = MemoryStore.open(path)
    assert verify(after.path) == []
    after.check_passages("sha256:p1")
    after.check_passages("sha256:p2")
    _, lengths = _memory(after, whole.ids)
    np.testing.assert_array_equal(lengths, whole.lengths(range(23)))
    # The first reader, and one that opens that version, see the old passages.
    for store in (before, MemoryStore.open(path, version=1)):
        assert len(store) == 9
        for a, b in zip(_memory(store, whole.ids[:9]), seen, strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="VERSION 7 .*newest version is 2"):
        MemoryStore.open(path, version=7)
    # Nothing new: nothing happens.
    assert tiny.append_tiny(path, whole).version == 2
    (path / "versions" / "000001.json").write_bytes((path / "manifest.json").read_bytes())
    with pytest.raises(manifest.DamagedStore, match="000001.json is damaged: it holds version 2"):
        MemoryStore.open(path, version=1)
    with pytest.raises(ValueError, match="version 2: .*changed"):
        tiny.build_tiny(path)


@pytest.mark.fault
def test_a_stopped_append_resumes(tiny, tmp_path):
    path, whole = tmp_path / "s", tiny.TinyPassages()
    tiny.build_tiny(path, tiny.part(range(9)))
    STOP.request()
    with pytest.raises(StopRequested, match="[Rr]erun the same command"):
        tiny.append_tiny(path, whole)
    STOP.clear()
    assert MemoryStore.open(path).manifest.version == 1
    assert tiny.append_tiny(path, whole).num_passages == 23


class _Stopped(Exception):
    pass


@pytest.mark.fault
@pytest.mark.parametrize("change", ["append", "replace", "withdraw", "merge", "repair"])
def test_a_change_stopped_behind_any_write_is_completed_by_a_rerun(
    tiny, tmp_path, folder_bytes, monkeypatch, change
):
    passages, edited = tiny.part(range(14)), tiny.part(range(14))
    edited.all_tokens[3] = edited.all_tokens[3][::-1] + 1
    tiny.build_tiny(tmp_path / "built", passages)
    other = tiny.TinyPassages(count=4, seed=7)
    other.ids = other.ids + 1
    tiny.build_tiny(tmp_path / "other", other)

    def run(path):
        if change == "append":
            tiny.append_tiny(path, tiny.TinyPassages())
        elif change == "replace":
            tiny.append_tiny(path, edited, replace=True)
        elif change == "withdraw":
            edit.withdraw(path, passages.ids[[3, 7]].tolist())
        elif change == "merge":
            edit.merge([tmp_path / "built", tmp_path / "other"], path)
        else:
            maintain.repair(tiny.encoder(), passages, path, passages_fingerprint="sha256:p1")

    def start(path):
        if change != "merge":
            shutil.copytree(tmp_path / "built", path)
        if change == "repair":
            for name in ("states", "titles"):
                shutil.rmtree(path / "shards" / "000001" / name)

    start(tmp_path / "whole")
    run(tmp_path / "whole")
    write_file, stops = folder.write_file, 0
    for last in range(100):
        path, writes = tmp_path / f"stopped{last}", []
        start(path)

        def write(kvstore, key, data, last=last, writes=writes):
            write_file(kvstore, key, data)
            if "memory://" not in kvstore.url:
                writes.append(key)
                if len(writes) > last:
                    raise _Stopped

        with monkeypatch.context() as patch:
            patch.setattr(folder, "write_file", write)
            try:
                run(path)
            except _Stopped:
                stops += 1
            else:
                break
        run(path)
        assert folder_bytes(path) == folder_bytes(tmp_path / "whole")
    assert stops >= 2


@pytest.mark.fault
def test_shards_of_a_stopped_append_do_not_block_other_passages(tiny, tmp_path):
    whole, other = tiny.TinyPassages(), tiny.TinyPassages()
    other.all_tokens[20] = other.all_tokens[20][::-1] + 1
    folders = [tmp_path / "left", tmp_path / "fresh"]
    for path in folders:
        tiny.build_tiny(path, tiny.part(range(9)))
    manifest_file = folders[0] / manifest.MANIFEST
    before = manifest_file.read_bytes()
    # All shards finished, and killed before the manifest.
    tiny.append_tiny(folders[0], whole)
    shutil.rmtree(folders[0] / "versions")
    manifest_file.write_bytes(before)
    first, *_ = sorted((folders[0] / "shards").glob("*/shard.json"))[2:]
    first.write_bytes(first.read_bytes()[:-9])
    for path in folders:
        tiny.append_tiny(path, other)
    assert verify(folders[0]) == []
    left, fresh = (
        {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
        for path in folders
    )
    assert left == fresh


@pytest.mark.fault
def test_a_damaged_manifest_of_an_edited_store_is_not_rewritten(tiny, tmp_path):
    path, whole = tmp_path / "s", tiny.TinyPassages()
    tiny.build_tiny(path, tiny.part(range(9)))
    edit.withdraw(path, whole.ids[[3]].tolist())
    tiny.append_tiny(path, whole)
    flipped = bytearray((path / manifest.MANIFEST).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (path / manifest.MANIFEST).write_bytes(flipped)
    files = {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
    for attempt in (lambda: MemoryStore.open(path), lambda: tiny.build_tiny(path)):
        with pytest.raises(manifest.DamagedStore, match="Version 2 is intact: .*VERSION = 2"):
            attempt()
    assert {f: f.read_bytes() for f in path.rglob("*") if f.is_file()} == files
    store = MemoryStore.open(path, version=2)
    with pytest.raises(ValueError, match=r"1 passage ids .*\(1 of them withdrawn\)"):
        store.rows(whole.ids[[3]])
    for kept in (path / "versions").iterdir():
        kept.write_bytes(kept.read_bytes()[:-9])
    for state, spoil in (("damaged", lambda: None), ("missing", (path / manifest.MANIFEST).unlink)):
        spoil()
        wanted = f"is {state}, .*versions/ is damaged"
        with pytest.raises(manifest.DamagedStore, match=wanted):
            tiny.build_tiny(path)


@pytest.mark.fault
def test_an_edited_store_without_its_manifest_is_not_rebuilt(tiny, tmp_path):
    path, whole = tmp_path / "s", tiny.TinyPassages()
    tiny.build_tiny(path)
    edit.withdraw(path, whole.ids[[3]].tolist())
    (path / manifest.MANIFEST).unlink()
    with pytest.raises(manifest.DamagedStore, match="is missing, .*Version 1 is intact"):
        tiny.build_tiny(path)
    # One that was only built is only finished again.
    other = tmp_path / "t"
    tiny.build_tiny(other)
    (other / manifest.MANIFEST).unlink()
    assert tiny.build_tiny(other).skipped == 4


def test_changed_text_is_rejected_or_replaced(tiny, copied_store):
    other = tiny.TinyPassages()
    other.all_tokens[20] = other.all_tokens[20][::-1] + 1
    with pytest.raises(ValueError, match=rf"1 passages .* {other.ids[20]}\. Set REPLACE=True"):
        tiny.append_tiny(copied_store, other)
    made = tiny.append_tiny(copied_store, other, replace=True)
    assert made.withdrawn == (20,) and made.num_passages == 24
    store = MemoryStore.open(copied_store)
    assert store.rows(other.ids[[20]]) == [23]
    with pytest.raises(ValueError, match="another build: codec bf16"):
        edit.append(
            tiny.encoder(codec="f32"), other, copied_store, passages_fingerprint="sha256:p2"
        )


def test_withdrawn_passages_are_unknown_and_stay_so(tiny, copied_store):
    ids = tiny.TinyPassages().ids
    made = edit.withdraw(copied_store, ids[[3, 7]].tolist())
    assert (made.version, made.withdrawn) == (2, (3, 7))
    store = MemoryStore.open(copied_store)
    assert store.rows(ids[[2, 3, 7]], "mask").tolist() == [2, -1, -1]
    with pytest.raises(ValueError, match=r"2 passage ids .*\(2 of them withdrawn\)"):
        store.rows(ids[[3, 7]])
    # Neighbours are read as before, and what was withdrawn is empty.
    now, lengths = store.read(np.arange(23), 12)
    then, _ = MemoryStore.open(copied_store, version=1).read(np.arange(23), 12)
    rest = np.delete(np.arange(23), [3, 7])
    np.testing.assert_array_equal(now["states"][rest], then["states"][rest])
    assert not lengths[[3, 7]].any() and not now["states"][[3, 7]].view(np.uint16).any()
    # Withdrawn already, wholly or in part; an id that the store never had is an error.
    assert edit.withdraw(copied_store, [int(ids[3])]) == made
    with pytest.raises(ValueError, match=r"1 passage ids .*\b12\b"):
        edit.withdraw(copied_store, [int(ids[3]), 12])
    # The corpus that still has them does not bring them back, unless told so.
    tiny.append_tiny(copied_store, tiny.TinyPassages())
    assert (MemoryStore.open(copied_store).rows(ids[[3, 7]], "mask") == -1).all()
    tiny.append_tiny(copied_store, tiny.TinyPassages(), replace=True)
    assert MemoryStore.open(copied_store).rows(ids[[3, 7]]).tolist() == [23, 24]


def test_withdrawing_everything_leaves_an_empty_store(tiny, copied_store):
    ids = tiny.TinyPassages().ids
    edit.withdraw(copied_store, ids.tolist())
    store = MemoryStore.open(copied_store)
    assert (store.rows(ids, "mask") == -1).all()


@pytest.mark.fault
def test_merge_equals_the_parts_and_can_be_rerun(tiny, tmp_path, folder_bytes):
    whole = tiny.TinyPassages()
    for name, rows in (("a", range(12)), ("b", range(12, 23))):
        tiny.build_tiny(tmp_path / name, tiny.part(rows), passages_fingerprint=name)
    edit.withdraw(tmp_path / "b", [int(whole.ids[13])])
    parts = [tmp_path / "a", tmp_path / "b"]
    made = edit.merge(parts, tmp_path / "m")
    assert made.passages_fingerprints == ("a", "b") and made.withdrawn == (13,)
    store = MemoryStore.open(tmp_path / "m")
    assert verify(store.path) == []
    for part, rows in zip(parts, (range(12), [12, *range(14, 23)]), strict=True):
        mine, theirs = (
            _memory(store, whole.ids[rows]),
            _memory(MemoryStore.open(part), whole.ids[rows]),
        )
        np.testing.assert_array_equal(mine[0], theirs[0])
    before = folder_bytes(tmp_path / "m")
    (tmp_path / "m" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "m" / "shards" / "000003")
    edit.merge(parts, tmp_path / "m")
    assert folder_bytes(tmp_path / "m") == before


@pytest.mark.fault
@pytest.mark.fault
def test_a_merged_store_with_a_damaged_manifest_is_not_rebuilt(tiny, tmp_path, folder_bytes):
    parts = [tmp_path / "a", tmp_path / "b"]
    for path, rows in zip(parts, (range(12), range(12, 23)), strict=True):
        tiny.build_tiny(path, tiny.part(rows))
    path = tmp_path / "m"
    edit.merge(parts, path)
    before = folder_bytes(path)
    file = path / manifest.MANIFEST
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(manifest.DamagedStore, match="merged.*Version 1 is intact"):
        tiny.build_tiny(path, tiny.part(range(12)))
    # The way out that the message names.
    shutil.copy(path / "versions" / "000001.json", file)
    assert folder_bytes(path) == before and verify(path) == []


def test_parts_that_do_not_fit_are_rejected(tiny, tiny_store, copied_store, tmp_path):
    with pytest.raises(ValueError, match="PARTS share 23 passage ids"):
        edit.merge([tiny_store, copied_store], tmp_path / "m")
    with pytest.raises(ValueError, match="PARTS needs two or more"):
        edit.merge([tiny_store], tmp_path / "m")
    tiny.build_tiny(tmp_path / "other", encoder_fingerprint="sha256:e2")
    with pytest.raises(ValueError, match="encoder_fingerprint sha256:e2"):
        edit.merge([tiny_store, tmp_path / "other"], tmp_path / "m")
    tiny.build_tiny(tmp_path / "a", tiny.part(range(2)))
    edit.withdraw(copied_store, tiny.TinyPassages().ids[:2].tolist())
    with pytest.raises(ValueError, match="MEMORY_DIR .*another memory store"):
        edit.merge([copied_store, tmp_path / "a"], tiny_store)
    (tmp_path / "a" / "shards" / "000000" / "ids" / "zarr.json").write_text("{ }")
    with pytest.raises(manifest.DamagedStore):
        edit.merge([copied_store, tmp_path / "a"], tmp_path / "m")


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["bytes", "folder", "record"])
def test_repair_rebuilds_damaged_shards_with_the_bytes_they_had(
    tiny, tiny_store, copied_store, folder_bytes, damage
):
    shard = copied_store / "shards" / "000001"
    if damage == "bytes":
        file = shard / "states" / "c" / "0" / "0"
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    elif damage == "folder":
        shutil.rmtree(shard)
    else:
        (shard / "shard.json").write_text("{}")
    passages = tiny.TinyPassages()

    def repair(encoder=tiny.encoder(), passages=passages, fingerprint="sha256:p1"):
        return maintain.repair(encoder, passages, copied_store, passages_fingerprint=fingerprint)

    with pytest.raises(ValueError, match="sha256:p1.*sha256:p2"):
        repair(fingerprint="sha256:p2")
    with pytest.raises(ValueError, match="shard 000001 .* program .rows=4.*rows=8"):
        repair(tiny.encoder(rows=8))
    other = tiny.TinyPassages()
    other.all_tokens[7] = other.all_tokens[7] + 1
    with pytest.raises(ValueError, match="000001 .*other bytes"):
        repair(passages=other)
    assert repair() == ["000001"]
    assert folder_bytes(copied_store) == folder_bytes(tiny_store)
    assert repair() == []


def test_repair_stops_on_request_and_reports_progress(
    tiny, copied_store, folder_bytes, monkeypatch, caplog
):
    (copied_store / "shards" / "000002" / "shard.json").unlink()
    before, looked = folder_bytes(copied_store), []
    check_shard = maintain.check_shard

    def look(kvstore, entry):
        looked.append(entry.name)
        if len(looked) == 2:
            STOP.request()
        return check_shard(kvstore, entry)

    monkeypatch.setattr(maintain, "check_shard", look)
    monkeypatch.setattr(progress, "EVERY_SECONDS", -1.0)
    with (
        caplog.at_level("INFO", "glimmer_jax"),
        pytest.raises(StopRequested, match="before anything was repaired"),
    ):
        maintain.repair(
            tiny.encoder(),
            tiny.TinyPassages(),
            copied_store,
            passages_fingerprint="sha256:p1",
        )
    assert looked == ["000000", "000001"] and folder_bytes(copied_store) == before
    assert "verify: 1 of " in caplog.text and "s left" in caplog.text


def test_repair_finds_appended_passages_by_id(tiny, tmp_path, folder_bytes):
    path, whole = tmp_path / "s", tiny.TinyPassages()
    tiny.build_tiny(path, tiny.part(range(12, 23)))
    tiny.append_tiny(path, whole)
    before = folder_bytes(path)
    for name in ("000000", "000003"):
        (path / "shards" / name / "states" / "c" / "0" / "0").unlink()
    rebuilt = maintain.repair(tiny.encoder(), whole, path, passages_fingerprint="sha256:p2")
    assert rebuilt == ["000000", "000003"] and folder_bytes(path) == before


@pytest.mark.fault
def test_ids_that_are_lost_are_those_that_no_other_shard_has(tiny, tmp_path, folder_bytes):
    path, whole = tmp_path / "s", tiny.TinyPassages()
    tiny.build_tiny(path, tiny.part(range(12, 23)))
    tiny.append_tiny(path, whole)
    before = folder_bytes(path)
    # One that was built, and the two that were added.
    for names in (["000001"], ["000002", "000003"]):
        for name in names:
            ids = path / "shards" / name / "ids" / "c" / "0"
            ids.write_bytes(ids.read_bytes()[:-1] + b"!")
        with pytest.raises(manifest.DamagedStore):
            MemoryStore.open(path)
        rebuilt = maintain.repair(tiny.encoder(), whole, path, passages_fingerprint="sha256:p2")
        assert rebuilt == names and folder_bytes(path) == before
    for name in ("000000", "000002"):
        shutil.rmtree(path / "shards" / name / "ids")
    more = tiny.TinyPassages(count=30)
    with pytest.raises(ValueError, match="Shard 000000 .*other bytes"):
        maintain.repair(tiny.encoder(), more, path, passages_fingerprint="sha256:p2")
    less = tiny.part(range(8, 23))
    with pytest.raises(ValueError, match="ids of shard 000002 are damaged"):
        maintain.repair(tiny.encoder(), less, path, passages_fingerprint="sha256:p2")


@pytest.mark.fault
def test_repair_that_was_stopped_has_removed_nothing(tiny, tmp_path, folder_bytes, monkeypatch):
    path, whole = tmp_path / "s", tiny.TinyPassages()
    tiny.build_tiny(path, tiny.part(range(12, 23)))
    tiny.append_tiny(path, whole)
    before = folder_bytes(path)
    for name in ("states", "titles", "digests", "offsets"):
        shutil.rmtree(path / "shards" / "000003" / name)
    damaged, write_file = folder_bytes(path), folder.write_file
    left = 3

    def full(kvstore, key, data):
        nonlocal left
        if "memory://" not in kvstore.url:
            left -= 1
            if left < 0:
                raise OSError("no room")
        write_file(kvstore, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_file", full)
        with pytest.raises(OSError, match="no room"):
            maintain.repair(tiny.encoder(), whole, path, passages_fingerprint="sha256:p2")
    assert damaged.items() <= folder_bytes(path).items()
    maintain.repair(tiny.encoder(), whole, path, passages_fingerprint="sha256:p2")
    assert folder_bytes(path) == before


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["key", "digit", "cut"])
def test_a_shard_with_a_damaged_record_is_rebuilt(
    tiny, tiny_store, copied_store, folder_bytes, damage
):
    (copied_store / manifest.MANIFEST).unlink()
    file = copied_store / "shards" / "000001" / "shard.json"
    text = file.read_text()
    if damage == "key":
        text = text.replace('"passages"', '"passagez"')
    elif damage == "digit":
        at = text.index('"source_sha256": "') + 20
        text = text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :]
    else:
        text = text[:-9]
    file.write_text(text)
    report = tiny.build_tiny(copied_store)
    assert (report.built, report.skipped) == (1, 3)
    assert folder_bytes(copied_store) == folder_bytes(tiny_store)


def test_appended_passages_are_those_of_one_build_and_of_one_program(tiny, tiny_store, tmp_path):
    path, whole = tmp_path / "s", tiny.TinyPassages()
    tiny.build_tiny(path, tiny.part(range(9)))

    def append(**kwargs):
        return edit.append(
            tiny.encoder(rows=8),
            whole,
            path,
            passages_fingerprint="sha256:p2",
            config=BuildConfig(Layout(6, 4), **kwargs),
        )

    with pytest.raises(ValueError, match="program .rows=4.*rows=8.*ACCEPT_OTHER_PROGRAM"):
        append()
    assert MemoryStore.open(path).manifest.version == 1
    assert len(append(accept_other_program=True).programs) == 2
    store, built = MemoryStore.open(path), MemoryStore.open(tiny_store)
    for ours, theirs in zip(_memory(store, whole.ids), _memory(built, whole.ids), strict=True):
        # The tiny encoder knows nothing of the passages beside a passage, so not a bit differs.
        np.testing.assert_array_equal(ours, theirs)


def test_a_passage_is_found_by_id_and_by_title(tiny, copied_store):
    passages = tiny.TinyPassages()
    edit.withdraw(copied_store, [int(passages.ids[8])])
    store = MemoryStore.open(copied_store)
    (found,) = maintain.find(store, int(passages.ids[7]))
    title = passages.title(7)
    assert found == {
        "id": int(passages.ids[7]),
        "title": title,
        "tokens": len(passages.all_tokens[7]),
        "row": 7,
        "shard": "000001",
        "withdrawn": False,
    }
    assert maintain.find(store, title) == [found]
    assert maintain.find(store, int(passages.ids[8]))[0]["withdrawn"]
    assert len(maintain.find(store, "TITLE")) == 23
    with pytest.raises(ValueError, match="'nowhere'"):
        maintain.find(store, "nowhere")
    json.dumps(maintain.inspect(store))


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_plan_estimates_the_cost_of_a_build(tiny, tmp_path, codec):
    passages = tiny.TinyPassages(count=200)
    made = tiny.build_tiny(
        tmp_path / "s",
        passages,
        encode=lambda tokens: encoding.encode_states(codec, tiny.encode_states(tokens)),
        codec=codec,
        layout=Layout(100, 64),
        reference=None,
    ).manifest
    t5 = T5Config(16, tiny.EMB_DIM, 2, 4, 16, num_encoder_layers=2, num_decoder_layers=1)
    config = GlimmerConfig(t5, memory_layers=1, memory_codec=codec)
    planned = estimate.plan(
        config,
        passages=200,
        tokens=made.num_tokens / 200,
        layout=Layout(100, 64),
        device_tflops=1e-6,
    )
    assert planned["tokens"] == made.num_tokens and planned["shards"] == len(made.shards)
    assert planned["files"] == len([f for f in (tmp_path / "s").rglob("*") if f.is_file()])
    assert planned["bytes"] == pytest.approx(made.num_bytes, rel=0.1)
    layer = 4 * 8 * 8 + 3 * 8 * 16
    hours = 2 * layer * made.num_tokens / 1e6 / 3600
    assert planned["device_hours"] == pytest.approx(hours, rel=1e-3)
    with pytest.raises(ValueError, match="positive .*memory_layers=1, 0 passages"):
        estimate.plan(config, passages=0, tokens=1, layout=Layout(1, 1), device_tflops=1)
