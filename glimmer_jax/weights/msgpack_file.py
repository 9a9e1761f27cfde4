"""The arrays of a Flax msgpack file: their paths, and where their bytes lie.

msgpack has no table of contents. The walk goes from array to array and reads only the few bytes in
front of each array's numbers.
"""

from collections.abc import Iterator

import ml_dtypes  # noqa: F401 (registers bfloat16 with numpy)
import msgpack
import numpy as np
import tensorstore as ts

from glimmer_jax.storage import folder
from glimmer_jax.weights.file_errors import InvalidWeights, check_dtype, parsing
from glimmer_jax.weights.lazy_arrays import ByteRange, checked_shape

_WINDOW_BYTES = 1 << 16
_ITEM_BYTES = 1 << 12  # more than a key, or the header of an array
_MAX_DEPTH = 64
# First byte of an item -> number of bytes of the length that follows.
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD4: 0, 0xD5: 0, 0xD6: 0, 0xD7: 0, 0xD8: 0}
_BINARIES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_CHUNKED = "__msgpack_chunked_array__"  # flax's key of an array of more than 1 GB


def locations(kvstore: ts.KvStore, file: str) -> dict[tuple[str, ...], ByteRange]:
    """The arrays of a file in a folder, by path.

    Raises:
      InvalidWeights: the file is missing, truncated or damaged, has an array in chunks, or its arrays
        are not weights.
    """
    where = f"{kvstore.url}{file}"
    folder.read_range(kvstore, file, 0, 1)  # raises if there is no file
    arrays: dict[tuple[str, ...], ByteRange] = {}
    with parsing(where, "Flax msgpack"):
        for path, array in _Walk(kvstore, file).arrays(()):
            if path in arrays:
                raise ValueError(f"it holds {'/'.join(path)} twice")
            arrays[path] = array
    last = max((array.offset + array.num_bytes for array in arrays.values()), default=1)
    if not folder.read_range(kvstore, file, last - 1, last):
        raise InvalidWeights(f"{where} is truncated: it needs {last} bytes. Download it again.")
    return arrays


class _Walk:
    """A position in a msgpack file."""

    def __init__(self, kvstore: ts.KvStore, file: str):
        self._kvstore, self._file, self._position = kvstore, file, 0
        self._window, self._window_start = b"", 0

    def arrays(self, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ByteRange]]:
        """The arrays of the map at the position, which moves behind it."""
        if len(path) > _MAX_DEPTH:
            raise RecursionError
        for _ in range(self._unpack("read_map_header")):
            key = self._unpack("unpack")
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r:.40} is not a string")
            if key == _CHUNKED:
                raise InvalidWeights(
                    f"{self._kvstore.url}{self._file} holds {'/'.join(path)} in chunks ({_CHUNKED}), "
                    "which are not supported. Save the model as safetensors."
                )
            if self._read(1)[0] in _EXTENSIONS:
                yield (*path, key), self._array("/".join((*path, key)))
            else:
                yield from self.arrays((*path, key))

    def _array(self, name: str) -> ByteRange:
        """An extension item of Flax: shape, name of the dtype, numbers."""
        self._skip_header(_EXTENSIONS)
        self._position += 1  # the code of the extension
        if self._unpack("read_array_header") != 3:
            raise ValueError(f"{name} is not an array")
        where = f"{self._kvstore.url}{self._file}"
        shape = checked_shape(where, name, self._unpack("unpack"))
        dtype = self._unpack("unpack")
        check_dtype(where, name, dtype)
        size = self._skip_header(_BINARIES)
        array = ByteRange(self._file, self._position, shape, np.dtype(dtype))
        if size != array.num_bytes:
            raise ValueError(f"{name} of shape {list(shape)} has {size} bytes")
        self._position += size
        return array

    def _skip_header(self, kinds: dict[int, int]) -> int:
        """Moves behind the first byte and the length of an item; returns the length."""
        data = self._read(5)
        width = kinds[data[0]]
        self._position += 1 + width
        return int.from_bytes(data[1 : 1 + width], "big")

    def _unpack(self, method: str):
        unpacker = msgpack.Unpacker()
        unpacker.feed(self._read(_ITEM_BYTES))
        value = getattr(unpacker, method)()
        self._position += unpacker.tell()
        return value

    def _read(self, count: int) -> bytes:
        start = self._position - self._window_start
        if not 0 <= start <= len(self._window) - count:
            stop = self._position + _WINDOW_BYTES
            self._window = folder.read_range(self._kvstore, self._file, self._position, stop)
            self._window_start, start = self._position, 0
        return self._window[start : start + count]
