"""Where the tensors of a safetensors file and of a Flax msgpack file lie.

safetensors begins with a table of its tensors. msgpack has none: its maps are walked from array to
array, and of each only the few bytes before its numbers are read.
"""

import json
from collections.abc import Iterator

import ml_dtypes  # noqa: F401 (makes numpy know bfloat16)
import msgpack
import numpy as np
import tensorstore as ts

from glimmer_jax.storage import folder
from glimmer_jax.weights.lazy_arrays import Place

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_HEADER_BYTES = 100_000_000  # at most; the library's own limit
_WINDOW_BYTES = 1 << 16
_ITEM_BYTES = 1 << 12  # more than a key, or what stands before an array's numbers
# msgpack's first bytes -> bytes of the length that follows.
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD4: 0, 0xD5: 0, 0xD6: 0, 0xD7: 0, 0xD8: 0}
_BINARIES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_CHUNKED = "__msgpack_chunked_array__"  # flax's mark of an array of more than 1 GB


def safetensors_places(kvstore: ts.KvStore, file: str) -> dict[str, Place]:
    """The tensors of a safetensors file by name.

    Raises:
      ValueError: it is missing, is no such file, or holds tensors that are no floating-point numbers.
    """
    size = int.from_bytes(folder.read_range(kvstore, file, 0, 8), "little")
    try:
        header = json.loads(folder.read_range(kvstore, file, 8, 8 + min(size, _HEADER_BYTES)))
        header.pop("__metadata__", None)
        kinds = {one["dtype"] for one in header.values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(kvstore, file, "safetensors") from error
    if unread := sorted(kinds - set(_DTYPES)):
        raise ValueError(
            f"{kvstore.url}{file} holds tensors of type {', '.join(unread)}; weights are read in "
            f"{', '.join(_DTYPES)}. Save the model in one of these."
        )
    places = {}
    for name, one in header.items():
        begin, end = one["data_offsets"]
        place = Place(file, 8 + size + begin, tuple(one["shape"]), np.dtype(_DTYPES[one["dtype"]]))
        if end - begin != place.num_bytes:
            raise _damaged(kvstore, file, "safetensors")
        places[name] = place
    return places


def flax_places(kvstore: ts.KvStore, file: str) -> dict[tuple[str, ...], Place]:
    """The arrays of a file of Flax's msgpack by path.

    Raises:
      ValueError: it is missing, is no such file, or holds an array in chunks.
    """
    folder.read_range(kvstore, file, 0, 1)  # names a missing file
    try:
        return dict(_Walk(kvstore, file).arrays(()))
    except (msgpack.UnpackException, ValueError, KeyError, TypeError, IndexError) as error:
        if _CHUNKED in str(error):
            raise
        raise _damaged(kvstore, file, "Flax msgpack") from error


class _Walk:
    """A position in a file of msgpack."""

    def __init__(self, kvstore: ts.KvStore, file: str):
        self._kvstore, self._file, self._at = kvstore, file, 0
        self._window, self._start = b"", 0

    def arrays(self, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Place]]:
        for _ in range(self._unpack("read_map_header")):
            key = (*path, self._unpack("unpack"))
            if key[-1] == _CHUNKED:
                raise ValueError(
                    f"{self._kvstore.url}{self._file} holds {'/'.join(path)} in chunks "
                    f"({_CHUNKED}), which are not read. Save the model as safetensors."
                )
            if self._bytes(1)[0] in _EXTENSIONS:
                yield key, self._array()
            else:
                yield from self.arrays(key)

    def _array(self) -> Place:
        """An extension of flax's kind: shape, dtype's name, numbers."""
        self._skip_header(_EXTENSIONS)
        self._at += 1  # the extension's code
        if self._unpack("read_array_header") != 3:
            raise ValueError("no array")
        shape, dtype = self._unpack("unpack"), np.dtype(self._unpack("unpack"))
        size = self._skip_header(_BINARIES)
        place = Place(self._file, self._at, tuple(shape), dtype)
        if size != place.num_bytes:
            raise ValueError("no array")
        self._at += size
        return place

    def _skip_header(self, kinds: dict[int, int]) -> int:
        """Goes behind a first byte and its length; returns the length."""
        data = self._bytes(5)
        width = kinds[data[0]]
        self._at += 1 + width
        return int.from_bytes(data[1 : 1 + width], "big")

    def _unpack(self, how: str):
        unpacker = msgpack.Unpacker()
        unpacker.feed(self._bytes(_ITEM_BYTES))
        value = getattr(unpacker, how)()
        self._at += unpacker.tell()
        return value

    def _bytes(self, count: int) -> bytes:
        at = self._at - self._start
        if not 0 <= at <= len(self._window) - count:
            stop = self._at + _WINDOW_BYTES
            self._window = folder.read_range(self._kvstore, self._file, self._at, stop)
            self._start, at = self._at, 0
        return self._window[at : at + count]


def _damaged(kvstore: ts.KvStore, file: str, kind: str) -> ValueError:
    return ValueError(f"{kvstore.url}{file} is no {kind} file, or is damaged. Fetch it again.")
