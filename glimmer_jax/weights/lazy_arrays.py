"""Arrays that lie in files as plain bytes, opened without being read.

Hugging Face's files, safetensors and Flax's msgpack alike, hold a tensor as one run of bytes, in row
order. A table of where the runs begin makes TensorStores of them: what is asked of one (its transpose,
a stack of several, the slice of one device) is all that is read. The safetensors library reads files
on a local disk only; this reads buckets as well.

The zarr arrays that a checkpoint's own file names, opened all at once.

The arrays of an Orbax folder, opened without being read.

Orbax restores into a tree of the same shape. Public weights change shape on the way (layers are cut
out of stacks, and stacked anew), so its arrays are opened one by one, as the zarr arrays they are.
"""

import functools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from glimmer_jax.storage import folder
from glimmer_jax.storage.errors import storage_error

_BLOCK = 128  # rows and columns read from a disk at once
_BLOCK_BYTES = 1 << 23  # asked of a bucket at once
_LOCAL = "file://"


class Place(NamedTuple):
    """Where an array lies."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def exists(kvstore: ts.KvStore, file: str) -> bool:
    """Whether a folder has a file that is not empty.

    Raises:
      OSError: the storage did not answer, or refused.
    """
    try:
        return kvstore.read(file, byte_range=slice(0, 1)).result().state == "value"
    except ValueError as error:
        if not folder.is_damage(error):
            raise storage_error(f"{kvstore.url}{file}", error) from error
        return False


def open_array(kvstore: ts.KvStore, place: Place) -> ts.TensorStore:
    """The array at a place of a folder, in its own dtype; nothing is read yet.

    On a local disk a slice reads little more than itself. A bucket is asked for whole rows.

    Raises:
      ValueError: the file ends before the array; of a bucket's, when it is read.
    """
    if is_local(kvstore):
        read = _mapped(kvstore, place).__getitem__
        block = [min(size, _BLOCK) for size in place.shape]
    else:
        read = functools.partial(_rows, kvstore, place)
        row_bytes = max(1, math.prod(place.shape[1:]) * place.dtype.itemsize)
        block = [min(max(1, _BLOCK_BYTES // row_bytes), n) for n in place.shape[:1]]
        block += place.shape[1:]

    def fill(domain: ts.IndexDomain, array: np.ndarray, _: Any) -> None:
        array[...] = read(domain.index_exp)

    return ts.virtual_chunked(
        fill,
        domain=ts.IndexDomain(shape=place.shape),
        dtype=ts.dtype(place.dtype),
        chunk_layout=ts.ChunkLayout(read_chunk_shape=block),
    )


def is_local(kvstore: ts.KvStore) -> bool:
    """Whether a folder lies on this machine's disk."""
    return kvstore.url.startswith(_LOCAL)


def _mapped(kvstore: ts.KvStore, place: Place) -> np.ndarray:
    whole = np.memmap(kvstore.path + place.file, np.uint8, mode="r")
    data = whole[place.offset : place.offset + place.num_bytes]
    if data.size < place.num_bytes:
        raise _too_short(kvstore, place)
    return data.view(place.dtype).reshape(place.shape)


def _rows(kvstore: ts.KvStore, place: Place, index: tuple[slice, ...]) -> np.ndarray:
    row_bytes = place.num_bytes // place.shape[0]
    start, stop = (place.offset + row * row_bytes for row in (index[0].start, index[0].stop))
    data = folder.read_range(kvstore, place.file, start, stop)
    if len(data) < stop - start:
        raise _too_short(kvstore, place)
    return np.frombuffer(data, place.dtype).reshape(-1, *place.shape[1:])[:, *index[1:]]


def _too_short(kvstore: ts.KvStore, place: Place) -> ValueError:
    return ValueError(
        f"{kvstore.url}{place.file} ends before the array of shape {list(place.shape)} that begins at "
        f"byte {place.offset}. Fetch it again."
    )


def opened(path: Any, file: str, futures: Mapping[str, ts.Future]) -> dict[str, ts.TensorStore]:
    """Waits for all of them.

    Args:
      path: of the folder, for messages.
      file: the one in it that names the arrays.
      futures: of `ts.open`, by the array's name.

    Raises:
      OSError: the storage did not answer, or refused.
      ValueError: arrays are missing or damaged; all of them are named.
    """
    arrays, lost = {}, {}
    for name, future in futures.items():
        try:
            arrays[name] = future.result()
        except ValueError as error:
            if not folder.is_damage(error):
                raise storage_error(str(path), error) from error
            lost[name] = error
    if lost:
        raise ValueError(
            f"{path} lacks {len(lost)} arrays that its file {file} names: {', '.join(sorted(lost))}. "
            "Fetch them again."
        ) from next(iter(lost.values()))
    return arrays


METADATA = "_METADATA"


def open_arrays(kvstore: ts.KvStore, prefix: tuple[str, ...] = ()) -> dict[str, ts.TensorStore]:
    """The arrays below `prefix`, by path (`encoder/layers_0/mlp/wo/kernel`).

    Args:
      kvstore: of the folder with Orbax's `_METADATA` in it.
      prefix: keys of the tree.

    Raises:
      ValueError: nothing lies below `prefix`, or arrays are missing, all of which are named.
    """
    data = folder.read_file(kvstore, METADATA)
    if data is None:
        raise ValueError(f"{kvstore.url} has no {METADATA}: it is no Orbax checkpoint.")
    metadata = json.loads(data)
    paths = [
        tuple(str(entry["key"]) for entry in leaf["key_metadata"])
        for leaf in metadata["tree_metadata"].values()
    ]
    wanted = [path for path in paths if path[: len(prefix)] == prefix]
    if not wanted:
        raise ValueError(
            f"{kvstore.url} holds {sorted({path[0] for path in paths})} and no {'/'.join(prefix)}."
        )
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    in_one_file = exists(kvstore, "manifest.ocdbt")
    context = ts.Context()
    base: Any = kvstore.spec().to_json()
    futures = {}
    for path in wanted:
        name = ".".join(path)
        inside = (
            {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            if in_one_file
            else folder.subfolder(kvstore, name).spec().to_json()
        )
        futures["/".join(path[len(prefix) :])] = ts.open(
            # A missing chunk would read as zeros.
            {"driver": driver, "kvstore": inside, "fill_missing_data_reads": False},
            context=context,
            open=True,
            read=True,
        )
    return opened(kvstore.url, METADATA, futures)
