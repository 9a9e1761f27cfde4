"""Damaged and hostile passages folders: a clear error or the right content, never anything else."""

import json
import os
import shutil

import numpy as np
import pytest

from glimmer_jax import main as command_line
from glimmer_jax.corpus import checked_file, manifest
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.corpus.passages_writer import write_passages
from tests import damage

pytestmark = pytest.mark.fault


def write(path, salt):
    records = [
        {
            "id": f"{salt}-{i}" if i % 2 else i,
            "title": f"t{i}",
            "text": f"{salt} text " * (1 + i % 5),
        }
        for i in range(40)
    ]
    encode = lambda text: [2 + byte for byte in text.encode()]  # noqa: E731
    write_passages(path, records, encode, "sha256:one", 60, vocab_size=300, source="corpus")
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    # Several blocks per file.
    monkeypatch.setattr(checked_file, "BLOCK_BYTES", 256)
    return write(tmp_path / "passages", "new")


def read_everything(folder):
    passages = Passages.open(folder, "sha256:one")
    rows = passages.rows(passages.ids)
    records = list(passages.records())
    rows_by_name = passages.rows_of([record["id"] for record in records])
    content = (passages.tokens(rows, 70), passages.lengths(rows), passages.ids, rows_by_name)
    return [array.tolist() for array in content], records, len(passages)


def content_or_error(folder):
    """What the folder holds, and no error; or none, and the error, which must be the project's own."""
    try:
        return read_everything(folder), None
    except ValueError as error:
        return None, str(error) if command_line._is_ours(error) else "of a library"


def attack(folder, tmp_path, seed, count):
    older = write(tmp_path / "older", "old")
    intact = read_everything(folder)
    rejected = 0
    for description in damage.attacks(folder, seed=seed, count=count, older=older):
        content, error = content_or_error(folder)
        rejected += error is not None
        assert content == intact if error is None else str(folder) in error[:200], description
    assert rejected > count // 2


def test_damaged_folders_are_rejected_or_read_right(folder, tmp_path):
    attack(folder, tmp_path, 0, 60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_damaged_folders_are_rejected_or_read_right_300_times(folder, tmp_path, seed):
    attack(folder, tmp_path, seed, 60)


def forge(folder, change):
    """Changes the manifest and gives it a right checksum."""
    value = json.loads((folder / "manifest.json").read_text())
    del value["checksum"]
    change(value)
    manifest.write_manifest(folder, value)


def forge_file(folder, name, data):
    """Replaces a file and describes it in the manifest."""
    (folder / name).write_bytes(data)
    forge(
        folder,
        lambda value: value["files"].update({name: checked_file.file_checksums(folder / name)}),
    )


def test_hostile_manifests_are_rejected_whatever_their_checksum(folder):
    intact, content = damage.read_files(folder), read_everything(folder)
    hostile = [None, [], {}, "x", -1, 0, 1, 1.5, True, 2**40, 2**63, 10**30]
    for key in json.loads(intact["manifest.json"]):
        for wrong in hostile:
            forge(folder, lambda value, key=key, wrong=wrong: value.update({key: wrong}))
            read, error = content_or_error(folder)
            assert read == content if error is None else str(folder) in error[:200], (key, wrong)
            (folder / "manifest.json").write_bytes(intact["manifest.json"])
    for field in ("bytes", "sha256", "blocks"):
        for wrong in hostile:
            forge(folder, lambda v, f=field, w=wrong: v["files"]["tokens.npy"].update({f: w}))
            with pytest.raises(ValueError, match=r"manifest\.json"):
                Passages.open(folder)
            (folder / "manifest.json").write_bytes(intact["manifest.json"])
    (folder / "manifest.json").write_bytes(b'{"format_version":' + b"[" * 100_000)
    with pytest.raises(ValueError, match=r"manifest\.json: nested too deeply"):
        Passages.open(folder)


def int64(values):
    values = np.asarray(values, "<i8")
    return checked_file.npy_header(values.dtype, len(values)) + values.tobytes()


def values(folder, name):
    return np.load(folder / name)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("offsets.npy", lambda x: int64(x[::-1]), "offsets.npy: passages must have 1 to 60 tokens"),
        ("offsets.npy", lambda x: int64(x + 2**40), "offsets.npy: passages must have 1 to 60"),
        ("offsets.npy", lambda x: int64(x - 9), "offsets.npy: passages must have 1 to 60 tokens"),
        ("text_offsets.npy", lambda x: int64(x[::-1]), "text_offsets.npy: offsets must increase"),
        ("text_offsets.npy", lambda x: int64(x + 2**40), "text_offsets.npy: offsets must increase"),
        ("ids.npy", lambda x: int64(np.zeros_like(x)), "ids.npy: ids must be distinct"),
        ("ids.npy", lambda x: int64(-x), "ids.npy: ids must be distinct and not negative"),
        (
            "tokens.npy",
            lambda x: checked_file.npy_header(x.dtype, len(x)) + (x * 0 + 300).tobytes(),
            "tokens.npy: token ids must be below 300",
        ),
        (
            "ids.npy",
            lambda x: int64(x).replace(b"(40,), }  ", b"(20, 2), }"),
            r"ids.npy: expected the .npy header of 40 values",
        ),
        (
            "ids.npy",
            lambda x: int64(x).replace(b"'<i8'", b"'|O8'"),
            r"ids.npy: expected the .npy header of 40 values of int64",
        ),
    ],
)
def test_values_out_of_range_are_rejected_whatever_their_checksum(folder, name, change, message):
    data = change(values(folder, name))
    assert data != (folder / name).read_bytes()
    forge_file(folder, name, data)
    with pytest.raises(ValueError, match=message):
        read_everything(folder)


def test_a_block_is_verified_when_it_is_first_read_and_once(folder, monkeypatch):
    intact = (folder / "tokens.npy").read_bytes()
    data = bytearray(intact)
    data[-1] ^= 1
    (folder / "tokens.npy").write_bytes(data)
    passages = Passages.open(folder)
    wanted = passages.tokens([0], 60)
    with pytest.raises(ValueError, match=r"tokens\.npy .*bytes \d+ to \d+"):
        passages.tokens([39], 60)
    monkeypatch.setattr(checked_file, "_digest", lambda data: b"another")
    assert (passages.tokens([0], 60) == wanted).all()


@pytest.mark.parametrize(
    ("name", "method", "arguments"),
    [
        ("tokens.npy", "tokens", ([0], 60)),
        ("offsets.npy", "lengths", ([0],)),
        ("text_offsets.npy", "record", (0,)),
        ("passages.jsonl", "record", (0,)),
    ],
)
def test_a_file_that_is_truncated_while_it_is_open_is_reported(folder, name, method, arguments):
    read = getattr(Passages.open(folder), method)
    read(*arguments)
    # Without a check the next read would end the process with SIGBUS.
    os.truncate(folder / name, 0)
    with pytest.raises(ValueError, match=f"{name} was truncated from .* to 0 bytes"):
        read(*arguments)


def test_a_folder_of_the_format_before_names_the_remedy(folder):
    (folder / "manifest.json").write_text('{"format_version": 1, "files": {}}')
    with pytest.raises(ValueError, match="version 1, .*reads 2. Rerun --run_mode=passages"):
        Passages.open(folder)


@pytest.mark.parametrize("kind", damage.SPECIAL_FILES)
@pytest.mark.parametrize("name", ["manifest.json", "tokens.npy"])
def test_what_is_no_file_is_rejected_without_blocking(folder, kind, name):
    damage.SPECIAL_FILES[kind](folder / name)
    with pytest.raises(ValueError, match=name):
        Passages.open(folder)


def test_a_pipe_beside_the_folder_does_not_block_the_writer(folder):
    os.mkfifo(folder.parent / ".passages.writing-1")
    shutil.rmtree(folder)
    assert len(Passages.open(write(folder, "new"))) == 40
