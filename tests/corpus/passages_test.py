import errno
import fcntl
import json
import os
import tracemalloc

import numpy as np
import pytest

from glimmer_jax.corpus import checked_file
from glimmer_jax.corpus.ids import id_number
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.vocabulary import passage_text

RECORDS = [
    {"id": 2**62 + 7, "title": "b", "text": "longer text", "page": "b"},
    {"id": 3, "title": "a", "text": "é\u2028", "page": "a"},
    {"id": 41, "title": "", "text": "", "page": "c"},
]


def encode(text):
    return [2 + byte for byte in text.encode()]


def write(path, records=RECORDS, **settings):
    given = {"fingerprint": "sha256:one", "max_length": 20, "vocab_size": 300, **settings}
    return write_passages(path, records, encode, **given)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "passages", source="three lines")
    return tmp_path / "passages"


def test_what_was_written_is_read(folder):
    passages = Passages.open(folder, "sha256:one")
    passages.verify()
    assert len(passages) == 3 and passages.max_length == 20
    assert passages.ids.tolist() == [record["id"] for record in RECORDS]
    assert list(passages.records()) == RECORDS
    assert list(passages.records(1, 2)) == RECORDS[1:2]
    assert [passages.record(row) for row in range(3)] == RECORDS
    wanted = [encode(passage_text(r["title"], r["text"]))[:19] + [1] for r in RECORDS]
    rows = passages.rows([41, 3])
    assert rows.dtype == np.int32 and rows.tolist() == [2, 1]
    tokens = passages.tokens(rows, 40)
    assert tokens.dtype == np.int32 and tokens.shape == (2, 40)
    assert tokens[0].tolist() == wanted[2] + [0] * (40 - len(wanted[2]))
    assert passages.lengths(rows).tolist() == [len(wanted[2]), len(wanted[1])]
    assert passages.manifest["num_truncated"] == 2 and passages.manifest["source"] == "three lines"


def test_verifying_every_byte_is_logged(folder, caplog):
    passages = Passages.open(folder)
    assert not caplog.records
    with caplog.at_level("INFO", "glimmer_jax.corpus.passages"):
        passages.verify()
    assert "verifying the checksums of" in caplog.text


def test_absent_passages_are_all_padding(folder):
    passages = Passages.open(folder)
    rows = passages.rows(np.array([[3, -1], [-1, 41]]))
    assert rows.tolist() == [[1, -1], [-1, 2]]
    assert passages.tokens(rows, 8).shape == (2, 2, 8)
    assert not passages.tokens(rows, 8)[0, 1].any()
    assert passages.lengths(rows)[1, 0] == 0


def test_unknown_ids_are_reported(folder):
    with pytest.raises(ValueError, match="2 passage ids .*: 4, 99.*--run_mode=retrieve"):
        Passages.open(folder).rows([3, 99, 4, 99])
    with pytest.raises(ValueError, match="0 to 2, got 3"):
        Passages.open(folder).record(3)


def test_tokens_take_two_bytes_where_they_can(tmp_path):
    write(tmp_path / "small", vocab_size=65536)
    write(tmp_path / "large", vocab_size=65537)
    assert np.load(tmp_path / "small" / "tokens.npy").dtype == np.uint16
    assert np.load(tmp_path / "large" / "tokens.npy").dtype == np.int32


def test_another_vocabulary_is_rejected_with_both_fingerprints(folder):
    with pytest.raises(ValueError, match="sha256:one.* sha256:two"):
        Passages.open(folder, "sha256:two")


def test_missing_unfinished_and_foreign_folders_are_rejected(folder, tmp_path):
    with pytest.raises(ValueError, match="PASSAGES_DIR: no folder .*absent"):
        Passages.open(tmp_path / "absent")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 9}))
    with pytest.raises(ValueError, match="format version 9, .*reads 2. Rerun --run_mode=passages"):
        Passages.open(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="format version None.*reads 2"):
        Passages.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        Passages.open(folder)


@pytest.mark.fault
def test_damage_is_found(folder):
    tokens = bytearray((folder / "tokens.npy").read_bytes())
    tokens[-3] ^= 1
    (folder / "tokens.npy").write_bytes(tokens)
    with pytest.raises(ValueError, match=r"tokens\.npy is damaged"):
        Passages.open(folder).verify()
    (folder / "tokens.npy").write_bytes(tokens[:-2])
    with pytest.raises(ValueError, match=r"tokens\.npy: expected \d+ bytes, found \d+ bytes"):
        Passages.open(folder)
    (folder / "tokens.npy").unlink()
    with pytest.raises(ValueError, match="tokens.npy: .* regular file"):
        Passages.open(folder)


@pytest.mark.fault
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"records": [RECORDS[1], RECORDS[1]]}, "id 3 occurs twice"),
        ({"records": []}, "no passage"),
        ({"vocab_size": 50}, "token id outside 0..49"),
        ({"max_length": 1}, "MAX_PASSAGE_TOKENS must be at least 2"),
    ],
)
def test_an_invalid_corpus_leaves_no_files(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "passages", **settings)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_only_with_overwrite(folder):
    with pytest.raises(ValueError, match="exists already"):
        write(folder)
    write(folder, RECORDS[:1], overwrite=True)
    assert len(Passages.open(folder)) == 1
    assert [one.name for one in folder.parent.iterdir()] == ["passages"]


@pytest.mark.fault
def test_a_backup_that_was_never_replaced_is_restored(folder):
    # The name is no pattern.
    folder = folder.rename(folder.with_name("passages[1]"))
    aside = folder.parent / f".{folder.name}.writing-1-old"
    for start in (lambda: Passages.open(folder).verify(), lambda: write(folder, overwrite=True)):
        # Of a writer that is dead: what it was writing is locked by nobody.
        (folder.parent / f".{folder.name}.writing-1").mkdir(exist_ok=True)
        os.replace(folder, aside)
        start()
        assert folder.is_dir() and not aside.exists()
    # One that lives is in between for a moment.
    writing = folder.parent / f".{folder.name}.writing-1"
    writing.mkdir(exist_ok=True)
    os.replace(folder, aside)
    descriptor = os.open(writing, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(ValueError, match="PASSAGES_DIR: no folder"):
            Passages.open(folder)
    finally:
        os.close(descriptor)
    assert len(Passages.open(folder)) == len(RECORDS)


def test_what_a_killed_writer_of_the_same_process_id_left_is_no_obstacle(folder):
    left = folder.parent / f".{folder.name}.writing-{os.getpid()}-old"
    left.mkdir()
    (left / "tokens.npy").write_bytes(b"the folder that was replaced")
    write(folder, RECORDS[:1], overwrite=True)
    assert len(Passages.open(folder)) == 1 and not left.exists()


@pytest.mark.fault
def test_without_file_locks_a_backup_is_restored_and_no_folder_removed(folder, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    working = folder.parent / f".{folder.name}.writing-1"
    working.mkdir()
    os.replace(folder, working.with_name(f"{working.name}-old"))
    assert len(Passages.open(folder)) == len(RECORDS)
    write(folder, RECORDS[:1], overwrite=True)
    assert len(Passages.open(folder)) == 1 and working.is_dir()


def test_files_are_on_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source, target):
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write(tmp_path / "p")
    before = done[: done.index("rename")]
    assert {"tokens.npy", "offsets.npy", "ids.npy", "passages.jsonl", "manifest.json"} < set(before)
    assert done[-1] == tmp_path.name


def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path):
    killed, alive, other = (
        tmp_path / name for name in (".p.writing-1-old", ".p.writing-2", ".pp.writing-3")
    )
    for left in (killed, alive, other):
        left.mkdir()
        (left / "tokens.npy").write_bytes(b"half")
    descriptor = os.open(alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(ValueError, match="occurs twice"):
            write(tmp_path / "p", RECORDS[:1] * 2)
        # Nothing goes before something new is in its place.
        assert killed.exists()
        write(tmp_path / "p")
    finally:
        os.close(descriptor)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, other.name, "p"])
    Passages.open(tmp_path / "p").verify()


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    # With files smaller than a block, the hashed buffer would grow.
    monkeypatch.setattr(checked_file, "BLOCK_BYTES", 2**13)

    def write_many(count):
        records = ({"id": i, "title": "t", "text": "x"} for i in range(count))
        tracemalloc.start()
        write(tmp_path / str(count), records)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few, many = write_many(500), write_many(5000)
    # Only the ids of passages, at the end, to detect repeated ones.
    assert many - few < 4500 * 8


def test_numbers_and_external_ids_are_two_names_of_a_passage(tmp_path):
    names = ["doc-7", 7, "8", "007"]
    write(tmp_path / "p", [{"id": name, "title": "t", "text": "x"} for name in names])
    passages = Passages.open(tmp_path / "p")
    assert passages.rows_of(names).tolist() == [0, 1, 2, 3]
    assert passages.external_ids(passages.ids) == names
    # An integer and its digits are one id.
    assert passages.rows_of(["7", 8]).tolist() == [1, 2]
    with pytest.raises(ValueError, match="passage id 7 occurs twice"):
        write(tmp_path / "q", [{"id": name, "title": "t", "text": "x"} for name in (7, "7")])


def test_two_ids_with_one_number_are_rejected(tmp_path):
    taken = id_number("doc-7")
    records = [{"id": name, "title": "t", "text": "x"} for name in ("doc-7", taken)]
    with pytest.raises(ValueError, match=f"'doc-7' and {taken} have the same 63-bit number"):
        write(tmp_path / "p", records)
    assert not list(tmp_path.iterdir())


def test_a_memory_as_passages_folder_is_reported(folder):
    (folder / "manifest.json").write_text('{"format_version": 3, "shards": []}')
    with pytest.raises(ValueError, match="PASSAGES_DIR: .* memory or .*index"):
        Passages.open(folder)
