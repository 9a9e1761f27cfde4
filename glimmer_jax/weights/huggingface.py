"""T5 folders of Hugging Face, local or in a bucket: read tensor by tensor, and written."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
import tensorstore as ts

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.storage import folder
from glimmer_jax.storage.json_lines import parse_line
from glimmer_jax.weights import huggingface_names as names
from glimmer_jax.weights import t5_names
from glimmer_jax.weights.file_errors import InvalidWeights
from glimmer_jax.weights.huggingface_files import (
    CONFIG,
    INDEX,
    SAFETENSORS,
    equal,
    open_tensors,
    with_one_embedding,
)
from glimmer_jax.weights.lazy_arrays import has_bytes, read
from glimmer_jax.weights.model_config import config_from

VOCABULARY = "spiece.model"  # T5's SentencePiece model, as Hugging Face calls it
_FILE_BYTES = 5_000_000_000  # of one written file; Hugging Face's limit
# `model_type` of a folder with a divided encoder, and the key of our own settings in `config.json`.
_DIVIDED, _SETTINGS = "glimmer", "glimmer_jax"


def is_folder(kvstore: ts.KvStore) -> bool:
    """Whether a folder holds a Hugging Face model."""
    return has_bytes(kvstore, CONFIG)


def load(
    path: Any, kvstore: ts.KvStore
) -> tuple[dict[str, Any], GlimmerConfig, Mapping[str, Any], str]:
    """The parameters of a T5, or of a divided encoder that `save` has written.

    Args:
      path: of the folder, for messages.
      kvstore: the folder.

    Returns:
      Parameters (TensorStores), their configuration, what `save` recorded besides (`describe`), and a
      description.

    Raises:
      ValueError: another architecture, unreadable weights, or parameters that are missing, extra or
        misshapen, all of which are named.
    """
    config = parse_line(folder.read_file(kvstore, CONFIG) or b"{}", f"{path}/{CONFIG}")
    tensors = open_tensors(path, kvstore)
    stores = dict(tensors.opened)
    settings = config.get(_SETTINGS, {})
    if not isinstance(settings, dict):
        raise InvalidWeights(f"{path}/{CONFIG}: {_SETTINGS} is {settings!r:.40}, not an object.")
    if config.get("model_type") == _DIVIDED:
        described = config_from(settings, path)
        if described is None:
            raise InvalidWeights(
                f"{path}/{CONFIG} has model_type {_DIVIDED!r}, but no {_SETTINGS}/model_config. Export "
                "the model again with --run_mode=export."
            )
        model = t5_names.unrolled(described)
        tied = model.t5.tie_output
    else:
        names.check_type(path, config)
        stores = with_one_embedding(path, config, stores)
        tied = _is_tied(path, config, stores)
        scaled = tied and names.scales_output(config)
        model = GlimmerConfig(names.read_config(path, config, tie_output=scaled))
        if tied:
            stores.pop(names.OUTPUT, None)
        if tied and not scaled and names.EMBEDDING in stores:
            # A tied output layer without the scale is an untied one that starts as the embedding.
            stores[names.OUTPUT] = stores[names.EMBEDDING]
    t5_names.check_layers(path, model, len(stores))
    expected = {}
    for name, shape in t5_names.shapes(model).items():
        theirs = names.their_name(name, model)
        expected[theirs] = tuple(reversed(shape)) if names.transposed(name) else shape
    t5_names.check(path, expected, {name: tuple(store.shape) for name, store in stores.items()})

    def find(name: str) -> ts.TensorStore:
        store = stores[names.their_name(name, model)]
        return store.T if names.transposed(name) else store

    params = t5_names.tree_from(model, find)
    description = f"a Hugging Face {config['model_type']} in {path} ({tensors.files}): "
    description += t5_names.describe(params, model.t5)
    return params, model, settings, description


def _is_tied(path: Any, config: Mapping[str, Any], stores: Mapping[str, ts.TensorStore]) -> bool:
    if names.OUTPUT not in stores or names.EMBEDDING not in stores:
        return names.OUTPUT not in stores
    if equal(stores[names.OUTPUT], stores[names.EMBEDDING]):
        return True
    if names.scales_output(config):
        raise InvalidWeights(
            f"{path}: {names.OUTPUT} differs from {names.EMBEDDING}, but config.json ties them. Set "
            f'"tie_word_embeddings": false if the model is a T5 v1.1, or remove {names.OUTPUT}.'
        )
    return False


def save(
    path: Any,
    params: Mapping[str, Any],
    config: GlimmerConfig,
    described: Mapping[str, Any],
    vocabulary: bytes | None = None,
    file_bytes: int = _FILE_BYTES,
) -> None:
    """Writes parameters under Hugging Face's names: float32 safetensors, and `config.json` last.

    An undivided T5 (FiD) can be loaded with `transformers`. A divided encoder and FiDO's decoder have
    the names of the table in docs/weights.md, and `load` reads them.

    Args:
      path: of the folder, local or in a bucket.
      params: of `config`: numpy arrays, JAX arrays or TensorStores.
      config: the configuration.
      described: `model_config.describe` of it.
      vocabulary: the SentencePiece model, which is written as `spiece.model`.
      file_bytes: maximum size of a file that holds more than one tensor. Several files get an index.

    Raises:
      ValueError: the folder holds a model, Hugging Face's T5 lacks the activations, or a parameter is
        not finite.
      StopRequested: a stop was requested. The folder has no `config.json`, and a rerun writes it again.
    """
    settings = names.write_config(config.t5)
    if t5_names.is_t5(config):
        others = {name: value for name, value in described.items() if name != "model_config"}
        settings |= {_SETTINGS: others}
    else:
        settings |= {"architectures": [], "model_type": _DIVIDED, _SETTINGS: dict(described)}
    kvstore = folder.open_folder(path)
    if has_bytes(kvstore, CONFIG):
        # Overwriting it would mix two models until the last file is written.
        raise ValueError(f"{path} holds a model already. Remove it, or choose another folder.")
    leaves = {}
    for name, leaf in t5_names.flat_from(params).items():
        leaves[names.their_name(name, config)] = (name, leaf)
    files = _divide({theirs: 4 * leaf.size for theirs, (_, leaf) in leaves.items()}, file_bytes)
    count = len(files)
    written = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        written = [SAFETENSORS]
    elif folder.exists(kvstore, SAFETENSORS):
        # Readers prefer it to an index.
        raise ValueError(
            f"{path} holds {SAFETENSORS} of an export that did not end. Remove it, or choose another "
            "folder."
        )
    weight_map: dict[str, str] = {}
    for file, part in zip(written, files, strict=True):
        tensors = {}
        for theirs in part:
            STOP.poll()
            tensors[theirs] = _tensor(*leaves[theirs])
        data = safetensors.numpy.save(tensors, metadata={"format": "pt"})
        folder.write_file(kvstore, file, data)
        weight_map |= dict.fromkeys(part, file)
    if count > 1:
        size = sum(4 * leaf.size for _, leaf in leaves.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        folder.write_file(kvstore, SAFETENSORS + INDEX, folder.dump_json(index))
    if vocabulary is not None:
        folder.write_file(kvstore, VOCABULARY, vocabulary)
    folder.write_file(kvstore, CONFIG, folder.dump_json(settings))


def _tensor(name: str, leaf: Any) -> np.ndarray:
    array = read(name, leaf).astype(np.float32)
    return np.ascontiguousarray(array.T if names.transposed(name) else array)


def _divide(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes or a single name."""
    groups: list[list[str]] = []
    room = 0
    for name in sorted(sizes):
        if not groups or sizes[name] > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= sizes[name]
    return groups
