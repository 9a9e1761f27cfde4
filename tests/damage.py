"""Seeded damage to a folder of files: what disks, copies and people do to it.

    for description in damage.attacks(folder, seed=0, count=40, older=older_folder):
        try:
            content = read_everything(folder)
        except DamagedStore:
            continue  # a clear error
        assert content == intact, description

Each attack starts from the intact folder, and the folder is intact again after the loop.
"""

import contextlib
import json
import os
import pathlib
import random
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Path = pathlib.Path

_HOSTILE_NUMBERS = (-1, 0, 1, 7, 2**31, 2**50, 2**63, 0.5, 1e300)


# Files that are no JSON object, or whose values no computation survives.
JSON_TEXTS = (
    "[" * 100_000,
    '{"a":' * 100_000,
    "[]",
    "null",
    "7",
    "NaN",
    "-Infinity",
    "1" * 5000,
    '{"a": 1, "a": 2}',
    '{"a": 1e999}',
    '"\\ud800"',
    '"\ud800"',
    "\ufeff{}",
    "",
    "{",
)


class NotApplicable(Exception):
    """The folder has no file or no pair of files that an attack needs."""


def attacks(
    folder: Path,
    *,
    seed: int,
    count: int,
    older: Path | None = None,
    kinds: Sequence[str] | None = None,
) -> Iterator[str]:
    """Applies one attack after the other, and yields its description while it is in effect.

    Args:
      folder: small enough to be kept in RAM.
      seed: of the choice of files, positions and values.
      count: attacks; kinds take turns.
      older: an earlier state of the folder, or a folder of the same layout with other content.
      kinds: names from `KINDS`; default: all, those with `older` only where it is given.
    """
    draw = random.Random(seed)
    chosen = list(kinds or KINDS)
    if older is None:
        chosen = [kind for kind in chosen if not kind.startswith("older")]
    intact = read_files(folder)
    for number in range(count):
        kind = chosen[number % len(chosen)]
        try:
            target = KINDS[kind](folder, draw, older)
        except NotApplicable:
            continue
        try:
            yield f"attack {number} of seed {seed}: {kind} {target}"
        finally:
            _restore(folder, intact)


def read_files(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their path in it."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in _files(folder)}


def _restore(folder: Path, intact: dict[str, bytes]) -> None:
    for name in read_files(folder).keys() - intact.keys():
        (folder / name).unlink()
    for name, data in intact.items():
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        if not path.is_file() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _pick(choices: Sequence[Any], draw: random.Random) -> Any:
    if not choices:
        raise NotApplicable
    return draw.choice(choices)


def _any_file(folder: Path, draw: random.Random) -> Path:
    return _pick([path for path in _files(folder) if path.stat().st_size], draw)


def flip(folder: Path, draw: random.Random, older: Path | None) -> str:
    """One bit of one file."""
    path = _any_file(folder, draw)
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return f"{path.relative_to(folder)} at byte {place}"


def flip_digit(folder: Path, draw: random.Random, older: Path | None) -> str:
    """One digit of a JSON file: still JSON, with another number."""
    path = _pick([f for f in _files(folder) if f.suffix == ".json"], draw)
    data = bytearray(path.read_bytes())
    place = _pick([i for i, byte in enumerate(data) if chr(byte).isdigit()], draw)
    data[place] ^= 1 << draw.randrange(3)
    path.write_bytes(data)
    return f"{path.relative_to(folder)} at byte {place}"


def truncate(folder: Path, draw: random.Random, older: Path | None) -> str:
    """The end of a file, from one byte to all of them."""
    path = _any_file(folder, draw)
    data = path.read_bytes()
    kept = draw.choice([0, len(data) // 2, len(data) - 1, draw.randrange(len(data))])
    path.write_bytes(data[:kept])
    return f"{path.relative_to(folder)} to {kept} bytes"


def extend(folder: Path, draw: random.Random, older: Path | None) -> str:
    """A file with more bytes than were written."""
    path = _any_file(folder, draw)
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 64)))
    return str(path.relative_to(folder))


def zero(folder: Path, draw: random.Random, older: Path | None) -> str:
    """A block of zeros, as a file system may leave after a power cut."""
    path = _any_file(folder, draw)
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    stop = min(len(data), start + 64)
    if not any(data[start:stop]):
        raise NotApplicable
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)
    return f"{path.relative_to(folder)} from byte {start} to {stop}"


def delete(folder: Path, draw: random.Random, older: Path | None) -> str:
    """One file."""
    path = _any_file(folder, draw)
    path.unlink()
    return str(path.relative_to(folder))


def delete_folder(folder: Path, draw: random.Random, older: Path | None) -> str:
    """One folder with all files in it."""
    path = _pick(sorted(path for path in folder.rglob("*") if path.is_dir()), draw)
    shutil.rmtree(path)
    return str(path.relative_to(folder))


def _two_files(folder: Path, draw: random.Random) -> tuple[Path, Path]:
    """Two different files of the same name, such as one array of two shards."""
    first = _any_file(folder, draw)
    data = first.read_bytes()
    others = [
        path
        for path in _files(folder)
        if path.name == first.name and path != first and path.read_bytes() != data
    ]
    return first, _pick(others, draw)


def _two_folders(folder: Path, draw: random.Random) -> tuple[Path, Path]:
    """Two folders side by side, such as two shards, or two arrays of a shard."""
    first = _pick(sorted(path for path in folder.rglob("*") if path.is_dir()), draw)
    others = sorted(path for path in first.parent.iterdir() if path.is_dir() and path != first)
    return first, _pick(others, draw)


def swap_files(folder: Path, draw: random.Random, older: Path | None) -> str:
    """Two files in each other's place."""
    first, second = _two_files(folder, draw)
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    return f"{first.relative_to(folder)} and {second.relative_to(folder)}"


def copy_file(folder: Path, draw: random.Random, older: Path | None) -> str:
    """One file over another of the same name."""
    source, target = _two_files(folder, draw)
    shutil.copyfile(source, target)
    return f"{source.relative_to(folder)} over {target.relative_to(folder)}"


def swap_folders(folder: Path, draw: random.Random, older: Path | None) -> str:
    """Two folders in each other's place."""
    first, second = _two_folders(folder, draw)
    aside = first.with_name(f"{first.name}.aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    return f"{first.relative_to(folder)} and {second.relative_to(folder)}"


def copy_folder(folder: Path, draw: random.Random, older: Path | None) -> str:
    """One folder over the one beside it."""
    source, target = _two_folders(folder, draw)
    shutil.rmtree(target)
    shutil.copytree(source, target)
    return f"{source.relative_to(folder)} over {target.relative_to(folder)}"


def older_file(folder: Path, draw: random.Random, older: Path | None) -> str:
    """A file as it was before."""
    assert older is not None
    names = [str(path.relative_to(folder)) for path in _files(folder)]
    path = _pick([name for name in names if (older / name).is_file()], draw)
    shutil.copyfile(older / path, folder / path)
    return path


def older_folder(folder: Path, draw: random.Random, older: Path | None) -> str:
    """A folder as it was before."""
    assert older is not None
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir())
    path = _pick([name for name in names if (older / name).is_dir()], draw)
    shutil.rmtree(folder / path)
    shutil.copytree(older / path, folder / path)
    return path


def hostile_json(folder: Path, draw: random.Random, older: Path | None) -> str:
    """One value of a JSON file: an absurd number, another type, or gone."""
    path = _pick([f for f in _files(folder) if f.suffix == ".json"], draw)
    value = json.loads(path.read_bytes())
    container, key = _pick(list(places(value)), draw)
    before = container[key]
    if isinstance(before, bool) or not isinstance(before, int | float):
        container[key] = draw.choice([None, [], {}, "x", 2**50, "big", "uint8", "int64"])
    else:
        container[key] = draw.choice(_HOSTILE_NUMBERS)
    if draw.random() < 0.15 and isinstance(container, dict):
        del container[key]
    path.write_text(json.dumps(value))
    return f"{path.relative_to(folder)}, {key!r}: {before!r} -> {container!r:.60}"


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def _replaced(path: Path) -> Path:
    path.unlink()
    return path


def _socket(path: Path) -> None:
    # The path of a socket must be short.
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(_replaced(path).name)


SPECIAL_FILES: dict[str, Callable[[Path], Any]] = {
    "pipe": lambda path: os.mkfifo(_replaced(path)),
    "socket": _socket,
    "device": lambda path: _replaced(path).symlink_to("/dev/zero"),
    "folder": lambda path: _replaced(path).mkdir(),
    "dangling link": lambda path: _replaced(path).symlink_to("nowhere"),
    "link to itself": lambda path: _replaced(path).symlink_to(path.name),
    "empty file": lambda path: path.write_bytes(b""),
}


KINDS: dict[str, Callable[[Path, random.Random, Path | None], str]] = {
    function.__name__: function
    for function in (
        flip,
        flip_digit,
        truncate,
        extend,
        zero,
        delete,
        delete_folder,
        swap_files,
        copy_file,
        swap_folders,
        copy_folder,
        older_file,
        older_folder,
        hostile_json,
    )
}
