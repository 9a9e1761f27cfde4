"""T5 folders of Hugging Face, on disk or in a bucket: `config.json` with safetensors or Flax msgpack, in
one file or in several with an index. Read tensor by tensor, and written. Pickled weights are refused:
reading one runs code.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import tensorstore as ts

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.storage import folder
from glimmer_jax.storage.json_lines import parse_line
from glimmer_jax.weights import huggingface_names as names
from glimmer_jax.weights import t5_names
from glimmer_jax.weights.huggingface_files import flax_places, safetensors_places
from glimmer_jax.weights.lazy_arrays import exists, open_array
from glimmer_jax.weights.model_config import config_from

_CONFIG, _TORCH, _FLAX = "config.json", "model.safetensors", "flax_model.msgpack"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_INDEX = ".index.json"
NO_PICKLES = (
    "Pickled weights (.bin, .pt, .pth, .pkl) are not read, because reading them runs code: save the "
    "model with safe_serialization=True where it came from."
)
_FILE_BYTES = 5_000_000_000  # of one file when writing; their own limit
# The type of a divided encoder's folder, which transformers does not know, and where its setting is.
_DIVIDED, _SETTING = "glimmer", "glimmer_jax"


class Tensors(NamedTuple):
    """The tensors of a folder under PyTorch's names and in PyTorch's orientation."""

    opened: dict[str, ts.TensorStore]
    files: str  # in words


def is_folder(kvstore: ts.KvStore) -> bool:
    """Whether a Hugging Face model lies there."""
    return exists(kvstore, _CONFIG)


def load(path: Any, kvstore: ts.KvStore) -> tuple[dict[str, Any], GlimmerConfig, str | None, str]:
    """The parameters of a T5's folder, or of a divided encoder that `save` has written.

    Args:
      path: of the folder, for messages.
      kvstore: the folder.

    Returns:
      Parameters (TensorStores), the setting they belong to, the fingerprint of their vocabulary where
      `save` knew it, and in words what was found.

    Raises:
      ValueError: another architecture, no readable weights, or parameters that are missing, extra or
        misshapen, all of which are named.
    """
    config = parse_line(folder.read_file(kvstore, _CONFIG) or b"{}", f"{path}/{_CONFIG}")
    tensors = open_tensors(path, kvstore)
    found = {name: store for name, store in tensors.opened.items() if name not in names.IGNORED}
    if config.get("model_type") == _DIVIDED:
        described = config_from(config.get(_SETTING, {}), path)
        if described is None:
            raise ValueError(
                f"{path} is of type {_DIVIDED!r}, and its {_CONFIG} does not say which model it holds "
                f"({_SETTING}: model_config). Export it again with --run_mode=export."
            )
        setting = t5_names.looped(described)
        tied = setting.t5.tie_output
    else:
        tied = _is_tied(path, config, found)
        scaled = tied and names.scales_output(config)
        setting = t5_names.fid(names.read_config(path, config, tie_output=scaled))
        if tied:
            found.pop(names.OUTPUT, None)
        if tied and not scaled and names.EMBEDDING in found:
            # Tied, but not scaled: an untied output layer that starts as the embedding.
            found[names.OUTPUT] = found[names.EMBEDDING]
    wanted = {}
    for name, shape in t5_names.shapes(setting).items():
        theirs = names.their_name(name, setting)
        wanted[theirs] = tuple(reversed(shape)) if names.transposed(name) else shape
    t5_names.check(path, wanted, {name: tuple(store.shape) for name, store in found.items()})

    def read(name: str) -> ts.TensorStore:
        store = found[names.their_name(name, setting)]
        return store.T if names.transposed(name) else store

    params = t5_names.tree_from(setting, read)
    what = f"a Hugging Face {config['model_type']} in {path} ({tensors.files})"
    what += f": {t5_names.in_words(params, setting.t5)}"
    return params, setting, config.get(_SETTING, {}).get("vocabulary_fingerprint"), what


def save(
    path: Any,
    params: Mapping[str, Any],
    config: GlimmerConfig,
    described: Mapping[str, Any],
    file_bytes: int = _FILE_BYTES,
) -> None:
    """Writes parameters under Hugging Face's names: float32 safetensors, and `config.json` last.

    A whole T5 (FiD) is one for `transformers`. A divided encoder, or FiDO's decoder, has their names
    by the table in docs/weights.md, and `load` reads it.

    Args:
      path: of the folder, local or a bucket.
      params: of `config`, numpy, JAX arrays or TensorStores.
      config: the setting.
      described: what `model_config.describe` says of it.
      file_bytes: a file holds no more, but at least one tensor; several get an index.

    Raises:
      ValueError: a model is there already, or activations that T5 of Hugging Face does not have.
    """
    settings = names.write_config(config.t5)
    if not t5_names.is_t5(config):
        settings |= {"architectures": [], "model_type": _DIVIDED, _SETTING: dict(described)}
    kvstore = folder.open_folder(path)
    if exists(kvstore, _CONFIG):
        # Written over, it would be a mixture of two until the end.
        raise ValueError(f"{path} holds a model already. Remove it, or write into another folder.")
    leaves = {}
    for name, leaf in t5_names.flat_from(params).items():
        leaves[names.their_name(name, config)] = (leaf, names.transposed(name))
    files = _divide({name: 4 * leaf.size for name, (leaf, _) in leaves.items()}, file_bytes)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        file = _TORCH
        if len(files) > 1:
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: _theirs(*leaves[name]) for name in part}
        data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
        folder.write_file(kvstore, file, data)
        weight_map |= dict.fromkeys(part, file)
    if len(files) > 1:
        size = sum(4 * leaf.size for leaf, _ in leaves.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        folder.write_file(kvstore, _TORCH + _INDEX, folder.dump_json(index))
    folder.write_file(kvstore, _CONFIG, folder.dump_json(settings))


def _theirs(leaf: Any, transposed: bool) -> np.ndarray:
    array = np.asarray(leaf, np.float32)
    return np.ascontiguousarray(array.T if transposed else array)


def _divide(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes or one name."""
    groups: list[list[str]] = []
    room = 0
    for name in sorted(sizes):
        if not groups or sizes[name] > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= sizes[name]
    return groups


def _is_tied(path: Any, config: Mapping[str, Any], found: Mapping[str, ts.TensorStore]) -> bool:
    if names.OUTPUT not in found or names.EMBEDDING not in found:
        return names.OUTPUT not in found
    if _equal(found[names.OUTPUT], found[names.EMBEDDING]):
        return True
    if names.scales_output(config):
        raise ValueError(
            f"{path} has an output layer of its own, and config.json says that it is tied to the "
            'embedding. Set "tie_word_embeddings": false if the model is T5 v1.1, or remove '
            f"{names.OUTPUT}."
        )
    return False


def _equal(a: ts.TensorStore, b: ts.TensorStore) -> bool:
    """Bit equality, block by block: layers that differ do so in the first."""
    if a.shape != b.shape:
        return False
    blocks = (slice(i, min(i + 128, a.shape[0])) for i in range(0, a.shape[0], 128))
    return all(np.array_equal(a[block], b[block]) for block in blocks)


def open_tensors(path: Any, kvstore: ts.KvStore) -> Tensors:
    """The weights of a folder. Raises ValueError where there are none that can be read safely."""
    readers: tuple[tuple[str, Callable[[ts.KvStore, str], dict[str, ts.TensorStore]], str], ...] = (
        (_TORCH, _safetensors, "safetensors"),
        (_FLAX, _flax, "Flax msgpack"),
    )
    for one, read, kind in readers:
        if exists(kvstore, one + _INDEX):
            index = parse_line(
                folder.read_file(kvstore, one + _INDEX) or b"{}", f"{path}/{one}{_INDEX}"
            )
            files = sorted(set(index.get("weight_map", {}).values()))
            if missing := [file for file in files if not exists(kvstore, file)]:
                raise ValueError(
                    f"{path} lacks {missing}, which {one}{_INDEX} names. Fetch them again."
                )
            opened: dict[str, ts.TensorStore] = {}
            for file in files:
                opened |= read(kvstore, file)
            return Tensors(opened, f"{len(files)} {kind} files")
        if exists(kvstore, one):
            return Tensors(read(kvstore, one), one)
    present = [file for file in _PICKLED if exists(kvstore, file)]
    raise ValueError(
        f"{path} has {_CONFIG} and neither {_TORCH} nor {_FLAX}, nor an index of several; it has "
        f"{present or 'no weights'}. {NO_PICKLES}"
    )


def _safetensors(kvstore: ts.KvStore, file: str) -> dict[str, ts.TensorStore]:
    places = safetensors_places(kvstore, file)
    return {name: open_array(kvstore, place) for name, place in places.items()}


def _flax(kvstore: ts.KvStore, file: str) -> dict[str, ts.TensorStore]:
    opened = {}
    for path, place in flax_places(kvstore, file).items():
        store = open_array(kvstore, place)
        # Flax's kernels are not transposed.
        opened[names.torch_name(path)] = store.T if path[-1] == "kernel" else store
    return opened
