"""The header of a safetensors file: which tensors it holds, and where."""

import numpy as np
import tensorstore as ts

from glimmer_jax.storage import folder
from glimmer_jax.storage.json_lines import parse_line
from glimmer_jax.weights.file_errors import InvalidWeights, check_dtype, parsing
from glimmer_jax.weights.lazy_arrays import ByteRange, checked_shape

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_MAX_BYTES = 2**50  # of a file; more is no weights, and no position in a file
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit


def locations(kvstore: ts.KvStore, file: str) -> dict[str, ByteRange]:
    """The tensors of a file in a folder, by name.

    Raises:
      InvalidWeights: the file is missing, truncated or damaged, or its tensors are not weights.
    """
    where = f"{kvstore.url}{file}"
    size = int.from_bytes(folder.read_range(kvstore, file, 0, 8), "little")
    _check_header_size(where, size)
    tensors = parse_header(where, file, folder.read_range(kvstore, file, 8, 8 + size), size)
    last = max((t.offset + t.num_bytes for t in tensors.values()), default=8 + size)
    if not folder.read_range(kvstore, file, last - 1, last):
        raise _truncated(where, last)
    if folder.read_range(kvstore, file, last, last + 1):
        raise InvalidWeights(
            f"{where} is damaged: it is longer than the {last} bytes that its header describes. "
            "Download it again."
        )
    return tensors


def read(where: str, data: bytes) -> dict[str, np.ndarray]:
    """The tensors of a complete file in memory, by name; views of `data`.

    Raises:
      InvalidWeights: as `locations`.
    """
    size = int.from_bytes(data[:8], "little")
    _check_header_size(where, size)
    tensors = parse_header(where, where, data[8 : 8 + size], size)
    last = max((t.offset + t.num_bytes for t in tensors.values()), default=8 + size)
    if last != len(data):
        raise _truncated(where, last)
    return {
        name: np.frombuffer(data, t.dtype, t.num_bytes // t.dtype.itemsize, t.offset).reshape(
            t.shape
        )
        for name, t in tensors.items()
    }


def parse_header(where: str, file: str, header: bytes, size: int) -> dict[str, ByteRange]:
    """The tensors of a header of `size` bytes.

    The tensors must cover the rest of the file without holes and overlaps, as the format demands.
    """
    with parsing(where, "safetensors"):
        if len(header) < size:
            raise ValueError(f"the header of {size} bytes is truncated")
        entries = parse_line(header, where)
        entries.pop("__metadata__", None)
        tensors = {}
        for name, entry in entries.items():
            kind = entry["dtype"]
            check_dtype(where, name, _DTYPES.get(kind, kind))
            shape = checked_shape(where, name, entry["shape"])
            begin, end = entry["data_offsets"]
            tensor = ByteRange(file, 8 + size + begin, shape, np.dtype(_DTYPES[kind]))
            if (
                type(begin) is not int
                or begin < 0
                or end - begin != tensor.num_bytes
                or end > _MAX_BYTES
            ):
                raise ValueError(f"{name} has the offsets {begin}, {end} and the shape {shape}")
            tensors[name] = tensor
        position = 8 + size
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if tensor.offset != position:
                raise ValueError(f"tensors overlap or leave a hole at byte {position}")
            position += tensor.num_bytes
    return tensors


def _check_header_size(where: str, size: int) -> None:
    if not 2 <= size <= _MAX_HEADER_BYTES:
        raise InvalidWeights(
            f"{where} is not a valid safetensors file, or is damaged: its header would have {size} "
            "bytes. Download it again."
        )


def _truncated(where: str, size: int) -> InvalidWeights:
    return InvalidWeights(
        f"{where} is truncated: its header describes {size} bytes. Download it again."
    )
