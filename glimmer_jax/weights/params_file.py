"""Parameters as one small file: safetensors in bfloat16, and JSON that says what they are.

This is the form in which trained models are shipped with the code: half the size of float32, no
optimiser state, two files. Training from it goes on in float32.
"""

import hashlib
import json
import os
import tempfile
from typing import Any

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath

from glimmer_jax.storage.folder import in_bucket, local_path
from glimmer_jax.storage.json_lines import parse_line


def save_params_file(path: Any, params: dict[str, Any], config: dict[str, Any]) -> None:
    """Writes `path` (`NAME.safetensors`) and `NAME.json` beside it, locally or in a bucket.

    A pair that was there stays until the new one is complete; the JSON's sum tells a pair that a kill
    left between the two.

    Args:
      path: ends in `.safetensors`.
      params: nested dict of float arrays.
      config: JSON-able; model config, vocabulary fingerprint, and the like.

    Raises:
      ValueError: another ending.
    """
    path = check_name(path)
    flat = flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    # safetensors writes the buffer as it lies in memory.
    # Vectors stay as they are: they are small, and the score head lies close to 1, where bfloat16
    # has steps of 1/128.
    flat = {
        name: np.ascontiguousarray(x, ml_dtypes.bfloat16 if x.ndim > 1 else x.dtype)
        for name, x in flat.items()
    }
    data = safetensors.numpy.save(flat)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**config, "sha256": hashlib.sha256(data).hexdigest()}
    described = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    written = {path: data, path.with_suffix(".json"): described}
    try:
        for file, its in written.items():
            _unfinished(file).write_bytes(its)
        for file in written:
            _unfinished(file).replace(file)
    finally:
        for file in written:
            _unfinished(file).unlink(missing_ok=True)


def load_params_file(path: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters as nested dict of float32 numpy arrays, config) of a file pair.

    Raises:
      ValueError: a file is missing, damaged, or not of one pair.
    """
    path = check_name(path)
    config_path = path.with_suffix(".json")
    for wanted in (path, config_path):
        if not wanted.exists():
            raise ValueError(
                f"{wanted} is missing; parameters need both {path} and {config_path}. Fetch both; if "
                f"it is a model of Hugging Face, give its folder, {path.parent}."
            )
    data = path.read_bytes()
    config = parse_line(config_path.read_bytes(), str(config_path))
    if config.pop("sha256", None) != hashlib.sha256(data).hexdigest():
        raise ValueError(
            f"{path} is damaged, or not the file that {config_path} describes (sha256 differs). "
            "Fetch both files again."
        )
    flat = {name: x.astype(np.float32) for name, x in _tensors(path, data).items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/"), config


def _tensors(path: epath.Path, data: bytes) -> dict[str, np.ndarray]:
    if not in_bucket(path):
        return safetensors.numpy.load_file(path)
    # Of bfloat16 the library reads files alone.
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return safetensors.numpy.load_file(file.name)


def _unfinished(path: epath.Path) -> epath.Path:
    return path.with_name(f"{path.name}.unfinished-{os.getpid()}")


def check_name(path: Any) -> epath.Path:
    """The path, if it is called as a parameter file must be; raises ValueError otherwise."""
    path = epath.Path(local_path(path))
    if path.suffix != ".safetensors":
        raise ValueError(f"A parameter file is called NAME.safetensors, got {path}.")
    return path
