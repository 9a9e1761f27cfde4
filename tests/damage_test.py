"""The damage generator: every attack changes the folder, and the next one finds it intact."""

import json

import pytest

from tests import damage


@pytest.fixture
def folders(tmp_path):
    """(a folder of two parts, an older state of it)."""
    for name in ("now", "older"):
        for part in ("a", "b"):
            path = tmp_path / name / part
            path.mkdir(parents=True)
            (path / "data").write_bytes(f"{name} {part} ".encode() * 20)
            (path / "note.json").write_text(json.dumps({"of": part, "sizes": [20, 3]}))
    return tmp_path / "now", tmp_path / "older"


def test_every_attack_changes_the_folder_and_is_undone(folders):
    folder, older = folders
    intact = damage.read_files(folder)
    seen, changed = set(), 0
    for description in damage.attacks(folder, seed=0, count=140, older=older):
        seen.add(description.split(": ")[1].split()[0])
        changed += damage.read_files(folder) != intact
    assert seen == set(damage.KINDS)
    # An older file may be the same one.
    assert changed > 120
    assert damage.read_files(folder) == intact


def test_attacks_of_one_seed_are_the_same(folders):
    folder, _ = folders
    first, second, other = (list(damage.attacks(folder, seed=seed, count=30)) for seed in (1, 1, 2))
    assert first == second and first != [line.replace("seed 2", "seed 1") for line in other]
