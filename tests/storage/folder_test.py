import pathlib

import pytest

from glimmer_jax.corpus.passages_writer import write_passages
from glimmer_jax.storage import folder


def test_what_is_written_through_memory_maps_is_local():
    assert folder.local("X", "data/x") == pathlib.Path("data/x")
    with pytest.raises(ValueError, match=r"PASSAGES_DIR is written to a local disk, got gs://b/p"):
        write_passages("gs://b/passages", [], str.split, "f", 9, vocab_size=9)


@pytest.mark.parametrize(
    ("path", "parent"),
    [
        ("a.json", f"file://{pathlib.Path.cwd()}/"),
        ("/a.json", "file:///"),
        ("/data/a.json", "file:///data/"),
        (pathlib.Path("/data/a.json"), "file:///data/"),
        ("gs://bucket/a.json", "gs://bucket/"),
        ("gs://bucket/data/a.json", "gs://bucket/data/"),
    ],
)
def test_a_file_lies_in_its_folder(path, parent):
    place, name = folder.of_file(path)
    assert (place.url.rstrip("/"), name) == (parent.rstrip("/"), "a.json")
