"""Arrays in files, opened as TensorStores that read only what is asked of them.

A TensorStore can be transposed, stacked and sliced before anything is read, so that a device's
share of a parameter is all that is ever read. Three layouts are opened:

* a run of bytes in a file, as in safetensors and in Flax's msgpack (`open_bytes`);
* a zarr array in a folder of its own, as in T5X checkpoints (`open_zarr`);
* all arrays of an Orbax folder (`open_orbax`).

All of them work on a local disk and in a bucket.
"""

import functools
import math
import mmap
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from glimmer_jax.storage import folder
from glimmer_jax.storage.errors import storage_error
from glimmer_jax.storage.json_lines import parse_line
from glimmer_jax.weights.file_errors import InvalidWeights, check_dtype, check_finite, parsing

ORBAX_METADATA = "_METADATA"
_BLOCK = 128  # rows and columns of one read from a disk
_BLOCK_BYTES = 1 << 23  # of one read from a bucket
_LOCAL = "file://"
_MAX_RANK = 8


class ByteRange(NamedTuple):
    """An array as a run of bytes in a file, in row-major order."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def checked_shape(file: Any, name: str, shape: Any) -> tuple[int, ...]:
    """A shape from a file as a tuple. Raises InvalidWeights if no weights have such a shape."""
    sizes = tuple(shape) if isinstance(shape, list | tuple) else None
    if (
        sizes is None
        or len(sizes) > _MAX_RANK
        or not all(type(size) is int and size >= 1 for size in sizes)
    ):
        raise InvalidWeights(
            f"{file} gives {name} the shape {shape!r:.80}. Expected at most {_MAX_RANK} sizes of at "
            "least 1. Download or write the file again."
        )
    return sizes


def has_bytes(kvstore: ts.KvStore, file: str) -> bool:
    """Whether a folder has a file that is not empty.

    Raises:
      OSError: the storage failed or denied access, or has no regular file there.
    """
    folder.reject_special_files(kvstore, file)
    try:
        return kvstore.read(file, byte_range=slice(0, 1)).result().state == "value"
    except ValueError as error:
        if not folder.is_damage(error):
            raise storage_error(f"{kvstore.url}{file}", error) from error
        return False


def open_bytes(kvstore: ts.KvStore, location: ByteRange) -> ts.TensorStore:
    """The array at a location, in its own dtype. Nothing is read yet.

    On a local disk, reading a slice reads little more than the slice. In a bucket, full rows are
    read.

    Raises InvalidWeights, when the array is read, if the file ends before the array does.
    """
    if kvstore.url.startswith(_LOCAL):
        read = functools.partial(_read_mapped, kvstore, location, _map_file(kvstore, location))
        block = [min(size, _BLOCK) for size in location.shape]
    else:
        read = functools.partial(_read_rows, kvstore, location)
        row_bytes = max(1, math.prod(location.shape[1:]) * location.dtype.itemsize)
        block = [min(max(1, _BLOCK_BYTES // row_bytes), n) for n in location.shape[:1]]
        block += location.shape[1:]

    def fill(domain: ts.IndexDomain, array: np.ndarray, _: Any) -> None:
        array[...] = read(domain.index_exp)

    return ts.virtual_chunked(
        fill,
        domain=ts.IndexDomain(shape=location.shape),
        dtype=ts.dtype(location.dtype),
        chunk_layout=ts.ChunkLayout(read_chunk_shape=block),
    )


def _map_file(kvstore: ts.KvStore, location: ByteRange) -> mmap.mmap:
    with open(kvstore.path + location.file, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_mapped(
    kvstore: ts.KvStore, location: ByteRange, mapped: mmap.mmap, index: tuple[slice, ...]
) -> np.ndarray:
    # Reading behind the end of a mapped file would end the process (SIGBUS).
    if mapped.size() < location.offset + location.num_bytes:
        raise _truncated(kvstore, location)
    count = location.num_bytes // location.dtype.itemsize
    array = np.frombuffer(mapped, location.dtype, count, location.offset)
    return array.reshape(location.shape)[index]


def _read_rows(kvstore: ts.KvStore, location: ByteRange, index: tuple[slice, ...]) -> np.ndarray:
    if not location.shape:
        index = (slice(0, 1),)
    row_bytes = location.num_bytes // (location.shape[0] if location.shape else 1)
    start, stop = (location.offset + row * row_bytes for row in (index[0].start, index[0].stop))
    data = folder.read_range(kvstore, location.file, start, stop)
    if len(data) < stop - start:
        raise _truncated(kvstore, location)
    array = np.frombuffer(data, location.dtype)
    if not location.shape:
        return array.reshape(())
    return array.reshape(-1, *location.shape[1:])[:, *index[1:]]


def _truncated(kvstore: ts.KvStore, location: ByteRange) -> InvalidWeights:
    return InvalidWeights(
        f"{kvstore.url}{location.file} is truncated: the array of shape {list(location.shape)} at byte "
        f"{location.offset} needs {location.num_bytes} bytes. Download it again."
    )


def read(name: str, array: Any) -> np.ndarray:
    """A parameter as a numpy array, whose numbers are finite.

    Args:
      name: of the parameter, for messages.
      array: numpy array, JAX array or TensorStore.

    Raises:
      OSError: the storage failed or denied access.
      InvalidWeights: its data is missing or damaged, or holds NaN or infinities.
    """
    if not isinstance(array, ts.TensorStore):
        return check_finite(name, np.asarray(array))
    try:
        return check_finite(name, array.read().result())
    except InvalidWeights:
        raise
    except ValueError as error:
        if not folder.is_damage(error):
            raise storage_error(f"parameter {name}", error) from error
        raise InvalidWeights(
            f"The data of parameter {name} is missing or damaged: {error}. Download it again."
        ) from error


def open_zarr(kvstore: ts.KvStore, **spec: Any) -> ts.Future:
    """Starts to open the zarr array in a folder; see `wait_for`. Raises OSError for special files."""
    folder.reject_special_files(kvstore)
    return ts.open(
        # Otherwise a missing chunk would read as zeros.
        {"driver": "zarr", "fill_missing_data_reads": False, **spec},
        kvstore=kvstore,
        open=True,
        read=True,
    )


def wait_for(path: Any, file: str, futures: Mapping[str, ts.Future]) -> dict[str, ts.TensorStore]:
    """Opened arrays by name.

    Args:
      path: of the folder, for messages.
      file: the file in it that lists the arrays, for messages.
      futures: of `open_zarr`, by the array's name.

    Raises:
      OSError: the storage failed or denied access.
      InvalidWeights: arrays are missing or damaged (all of them are named), or are not weights.
    """
    arrays, damaged = {}, {}
    for name, future in futures.items():
        try:
            arrays[name] = future.result()
        except ValueError as error:
            # TensorStore reports metadata that it cannot parse as an invalid argument.
            if not (folder.is_damage(error) or str(error).startswith("INVALID_ARGUMENT: ")):
                raise storage_error(str(path), error) from error
            damaged[name] = error
    if damaged:
        raise InvalidWeights(
            f"{path}: {len(damaged)} arrays that {file} lists are missing or damaged: "
            f"{', '.join(sorted(damaged))}. Download them again."
        ) from next(iter(damaged.values()))
    for name, array in arrays.items():
        check_dtype(path, name, array.dtype.name)
        shape = checked_shape(path, name, array.shape)
        chunk = array.chunk_layout.read_chunk.shape or shape
        # A chunk is allocated completely, however small the array is.
        if any(size > max(length, 1) for size, length in zip(chunk, shape, strict=True)):
            raise InvalidWeights(
                f"{path} stores {name} of shape {list(shape)} in chunks of {list(chunk)}, which are "
                "larger than the array. Download or write it again."
            )
    return arrays


def open_orbax(kvstore: ts.KvStore, prefix: tuple[str, ...] = ()) -> dict[str, ts.TensorStore]:
    """The arrays below `prefix`, by path (`encoder/layers_0/mlp/wo/kernel`).

    `ocp.StandardRestore` needs a target of the saved shapes. Public weights are restacked and cut
    on the way, so their arrays are opened one by one, as the zarr arrays they are.

    Args:
      kvstore: the folder with Orbax's `_METADATA`.
      prefix: keys of the tree.

    Raises:
      InvalidWeights: nothing lies below `prefix`, or arrays are missing, damaged or not weights.
    """
    folder.reject_special_files(kvstore)
    data = folder.read_file(kvstore, ORBAX_METADATA)
    file = f"{kvstore.url}{ORBAX_METADATA}"
    if data is None:
        raise InvalidWeights(f"{file} is missing: the folder is not an Orbax checkpoint.")
    with parsing(file, "Orbax metadata"):
        metadata = parse_line(data, file)
        paths = [
            tuple(str(entry["key"]) for entry in leaf["key_metadata"])
            for leaf in metadata["tree_metadata"].values()
        ]
        names = [".".join(path) for path in paths]
        if len(set(names)) < len(names):
            raise ValueError("two arrays have the same name")
        if any(not key or "/" in key or "\\" in key for path in paths for key in path):
            raise ValueError("the key of an array is empty or holds a slash")
        zarr3 = metadata.get("use_zarr3", False)
        if not isinstance(zarr3, bool):
            raise ValueError(f"use_zarr3 is {zarr3!r:.40}")
    wanted = [path for path in paths if path[: len(prefix)] == prefix]
    if not wanted:
        raise InvalidWeights(
            f"{kvstore.url} holds {sorted({path[0] for path in paths})}, not {'/'.join(prefix)}. Give "
            "the folder of a T5X or glimmer_jax checkpoint."
        )
    in_one_file = has_bytes(kvstore, "manifest.ocdbt")
    context = ts.Context()
    futures = {}
    for path in wanted:
        name = ".".join(path)
        if in_one_file:
            base: Any = kvstore.spec().to_json()
            array_folder: Any = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        else:
            array_folder = folder.subfolder(kvstore, name).spec().to_json()
        futures["/".join(path[len(prefix) :])] = ts.open(
            {
                "driver": "zarr3" if zarr3 else "zarr",
                "kvstore": array_folder,
                "fill_missing_data_reads": False,
            },
            context=context,
            open=True,
            read=True,
        )
    return wait_for(kvstore.url, ORBAX_METADATA, futures)
