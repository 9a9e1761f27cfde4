"""The tensors of a Hugging Face folder: safetensors or Flax msgpack, in one file or in several.

Pickled weights are rejected, because reading a pickle runs code.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from glimmer_jax.storage import folder
from glimmer_jax.storage.json_lines import parse_line
from glimmer_jax.weights import huggingface_names as names
from glimmer_jax.weights import msgpack_file, safetensors_file
from glimmer_jax.weights.file_errors import InvalidWeights, parsing
from glimmer_jax.weights.lazy_arrays import has_bytes, open_bytes, read

CONFIG, SAFETENSORS, FLAX = "config.json", "model.safetensors", "flax_model.msgpack"
INDEX = ".index.json"
NO_PICKLES = (
    "Pickled weights (.bin, .pt, .pth, .pkl) are not read, because reading them runs code. Save the "
    "model with safe_serialization=True."
)
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FILE_NAME = re.compile(r"[\w-][\w.-]*")  # no folder, and not `..`


class Tensors(NamedTuple):
    """The tensors of a folder under PyTorch's names and in PyTorch's orientation."""

    opened: dict[str, ts.TensorStore]
    files: str  # a description


def open_tensors(path: Any, kvstore: ts.KvStore) -> Tensors:
    """The weights of a folder.

    Args:
      path: of the folder, for messages.
      kvstore: the folder.

    Raises:
      InvalidWeights: the weights are missing, pickled or damaged.
    """
    readers: tuple[tuple[str, Callable[[ts.KvStore, str], dict[str, ts.TensorStore]], str], ...] = (
        (SAFETENSORS, _open_safetensors, "safetensors"),
        (FLAX, _open_flax, "Flax msgpack"),
    )
    for file, open_file, kind in readers:
        # As transformers: an index beside a complete file is left over.
        if has_bytes(kvstore, file):
            return Tensors(open_file(kvstore, file), file)
        if has_bytes(kvstore, file + INDEX):
            files = _indexed_files(path, kvstore, file + INDEX)
            opened: dict[str, ts.TensorStore] = {}
            for part in files:
                tensors = open_file(kvstore, part)
                if repeated := sorted(tensors.keys() & opened.keys()):
                    raise InvalidWeights(
                        f"{path} holds {', '.join(repeated[:5])} in more than one of the files that "
                        f"{file}{INDEX} lists. Download the folder again."
                    )
                opened |= tensors
            return Tensors(opened, f"{len(files)} {kind} files")
    present = [file for file in _PICKLED if has_bytes(kvstore, file)]
    raise InvalidWeights(
        f"{path} has {CONFIG}, but neither {SAFETENSORS} nor {FLAX} nor an index of several such files. "
        f"Its weights: {present or 'none'}. {NO_PICKLES}"
    )


def with_one_embedding(
    path: Any, config: Mapping[str, Any], stores: dict[str, ts.TensorStore]
) -> dict[str, ts.TensorStore]:
    """The tensors with the embedding under one name, and without tables that nothing reads.

    Writers keep the embedding as `shared.weight`, as a copy in encoder or decoder, or as a tied output
    layer.

    Raises:
      InvalidWeights: copies of the embedding differ.
    """
    stores = {name: store for name, store in stores.items() if name not in names.UNUSED}
    copies = {name: stores.pop(name) for name in names.EMBEDDING_COPIES if name in stores}
    if names.EMBEDDING not in stores:
        if copies:
            stores[names.EMBEDDING] = copies[next(iter(copies))]
        elif names.OUTPUT in stores and config.get("tie_word_embeddings") is not False:
            stores[names.EMBEDDING] = stores[names.OUTPUT]
    for name, copy in copies.items():
        if names.EMBEDDING not in stores or not equal(copy, stores[names.EMBEDDING]):
            raise InvalidWeights(
                f"{path}: {name} differs from {names.EMBEDDING}. Encoder and decoder share one "
                "embedding here. Use a T5 that was trained with a shared embedding."
            )
    return stores


def equal(a: ts.TensorStore, b: ts.TensorStore) -> bool:
    """Bit equality, block by block: different layers differ in the first block."""
    if a.shape != b.shape:
        return False
    blocks = (slice(i, min(i + 128, a.shape[0])) for i in range(0, a.shape[0], 128))
    return all(
        np.array_equal(read(names.EMBEDDING, a[block]), read(names.EMBEDDING, b[block]))
        for block in blocks
    )


def _indexed_files(path: Any, kvstore: ts.KvStore, index: str) -> list[str]:
    where = f"{path}/{index}"
    with parsing(where, "index"):
        weight_map = parse_line(folder.read_file(kvstore, index) or b"", where)["weight_map"]
        files = sorted(set(weight_map.values()))
        if bad := [file for file in files if not _FILE_NAME.fullmatch(file)]:
            raise ValueError(f"{bad[0]!r:.80} is not the name of a file in the folder")
    if missing := [file for file in files if not has_bytes(kvstore, file)]:
        raise InvalidWeights(
            f"{path} lacks {missing}, which {index} lists. Download these files again."
        )
    return files


def _open_safetensors(kvstore: ts.KvStore, file: str) -> dict[str, ts.TensorStore]:
    tensors = safetensors_file.locations(kvstore, file)
    return {name: open_bytes(kvstore, location) for name, location in tensors.items()}


def _open_flax(kvstore: ts.KvStore, file: str) -> dict[str, ts.TensorStore]:
    opened = {}
    for path, location in msgpack_file.locations(kvstore, file).items():
        store = open_bytes(kvstore, location)
        # Flax's kernels are not transposed.
        opened[names.torch_name(path)] = store.T if path[-1] == "kernel" else store
    return opened
