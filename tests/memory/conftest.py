"""Fixtures of the memory tests: the tiny corpus and one finished build of it."""

import pathlib
import shutil
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import tiny_memory


@pytest.fixture
def tiny():
    return tiny_memory


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory):
    """Folder of a finished build; not to be changed."""
    path = tmp_path_factory.mktemp("memory") / "store"
    tiny_memory.build_tiny(path)
    return path


@pytest.fixture
def copied_store(tiny_store, tmp_path):
    """A copy of it that a test may damage."""
    return shutil.copytree(tiny_store, tmp_path / "copy")


@pytest.fixture
def folder_bytes():
    def read(path):
        files = [file for file in pathlib.Path(path).rglob("*") if file.is_file()]
        return {str(file.relative_to(path)): file.read_bytes() for file in files}

    return read
