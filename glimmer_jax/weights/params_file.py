"""Parameters as one small file: safetensors in bfloat16, with a JSON file that describes them.

Trained models are shipped with the code in this form: half the size of float32, no optimiser state,
two files. Training that starts from it uses float32.
"""

import hashlib
import json
import os
import pathlib
from typing import Any

import flax.traverse_util
import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath

from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.storage.folder import in_bucket, local_path, sync
from glimmer_jax.storage.json_lines import parse_line
from glimmer_jax.storage.lines import is_regular_file
from glimmer_jax.weights import safetensors_file
from glimmer_jax.weights.file_errors import InvalidWeights, check_finite, parsing
from glimmer_jax.weights.lazy_arrays import read


def save_params_file(
    path: Any, params: dict[str, Any], config: dict[str, Any], vocabulary: bytes | None = None
) -> None:
    """Writes `path` (`NAME.safetensors`) and `NAME.json` beside it, locally or in a bucket.

    An existing pair stays until the new one is complete. Checksums in the JSON file detect damage, and
    a pair of which a kill replaced only one file.

    Args:
      path: ends in `.safetensors`.
      params: nested dict of float arrays.
      config: JSON-able facts: model configuration, vocabulary fingerprint, and so on.
      vocabulary: the SentencePiece model, which is written as `NAME.spiece.model`.

    Raises:
      ValueError: the path has another ending, or a parameter is not finite.
      StopRequested: a stop was requested. No file has changed.
    """
    path = check_name(path)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    tensors = {}
    for name, leaf in flat.items():
        STOP.poll()
        tensors[name] = _rounded(name, leaf)
    data = safetensors.numpy.save(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**config, "sha256": hashlib.sha256(data).hexdigest()}
    content["fields_sha256"] = _fields_sha256(content)
    described = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    files = {path: data, path.with_suffix(".json"): described}
    if vocabulary is not None:
        files = {vocabulary_path(path): vocabulary, **files}
    try:
        for file, content_bytes in files.items():
            _unfinished(file).write_bytes(content_bytes)
            _sync(_unfinished(file))
        for file in files:
            _unfinished(file).replace(file)
            _sync(path.parent)
    finally:
        for file in files:
            _unfinished(file).unlink(missing_ok=True)


def _rounded(name: str, leaf: Any) -> np.ndarray:
    array = read(name, leaf)
    # Vectors keep their type: they are small, and the score head is close to 1, where bfloat16 has
    # steps of 1/128.
    dtype = ml_dtypes.bfloat16 if array.ndim > 1 else array.dtype
    # safetensors writes the buffer as it lies in memory.
    return check_finite(name, np.ascontiguousarray(array, dtype))


def load_params_file(path: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters as nested dict of float32 numpy arrays, config) of a pair of files.

    Raises:
      InvalidWeights: a file is missing or damaged, the two do not belong together, or a parameter is
        not finite.
    """
    path = check_name(path)
    config = read_config(path)
    data = path.read_bytes()
    if config.pop("sha256", None) != hashlib.sha256(data).hexdigest():
        raise InvalidWeights(
            f"{path} is damaged, or is not the file that {path.with_suffix('.json')} describes (sha256 "
            "differs). Copy both files again."
        )
    tensors = safetensors_file.read(str(path), data)
    flat = {
        name: check_finite(f"{name} of {path}", x.astype(np.float32)) for name, x in tensors.items()
    }
    with parsing(path, "parameter"):
        return flax.traverse_util.unflatten_dict(flat, sep="/"), config


def read_config(path: Any) -> dict[str, Any]:
    """The JSON beside a parameter file, without reading the parameters.

    Raises:
      InvalidWeights: one of the two files is missing, or the JSON is malformed or was changed.
    """
    path = check_name(path)
    config_path = path.with_suffix(".json")
    for file in (path, config_path):
        if not is_regular_file(file):
            raise InvalidWeights(
                f"{file} is missing or no regular file; a parameter file needs both {path} and "
                f"{config_path}. Copy both. For a model of Hugging Face give its folder, {path.parent}."
            )
    with parsing(config_path, "JSON"):
        config = parse_line(config_path.read_bytes(), str(config_path))
    wanted = config.pop("fields_sha256", None)  # earlier versions wrote none
    if wanted is not None and wanted != _fields_sha256(config):
        raise InvalidWeights(
            f"{config_path} is damaged or was edited: its fields_sha256 is not that of its other fields. "
            "Copy both files again, or export the model again."
        )
    return config


def _fields_sha256(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _sync(path: epath.Path) -> None:
    """After a power cut, a local file must not have its name without its bytes."""
    if not in_bucket(path):
        sync(pathlib.Path(path))


def _unfinished(path: epath.Path) -> epath.Path:
    return path.with_name(f"{path.name}.unfinished-{os.getpid()}")


def vocabulary_path(path: Any) -> epath.Path:
    """The SentencePiece model of the parameter file `path`, which need not exist."""
    return check_name(path).with_suffix(".spiece.model")


def check_name(path: Any) -> epath.Path:
    """The path of a parameter file. Raises ValueError if it does not end in `.safetensors`."""
    path = epath.Path(local_path(path))
    if path.suffix != ".safetensors":
        raise ValueError(f"OUTPUT_PATH of a parameter file must be NAME.safetensors, got {path}.")
    return path
