"""T5 folders of Hugging Face: `config.json` with safetensors (one file, or several with an index) or
Flax msgpack. Read tensor by tensor, and written. Pickled weights are refused: reading one runs code.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.weights import huggingface_names as names
from glimmer_jax.weights import t5_names

_CONFIG, _ONE, _FLAX = "config.json", "model.safetensors", "flax_model.msgpack"
_INDEX = f"{_ONE}.index.json"


class _Tensors(NamedTuple):
    """The tensors of a folder under PyTorch's names and in PyTorch's orientation."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    files: str  # in words


def is_folder(path: Any) -> bool:
    """Whether a Hugging Face model lies there."""
    return (pathlib.Path(path) / _CONFIG).is_file()


def load(path: Any) -> tuple[dict[str, Any], GlimmerConfig, str]:
    """(FiD's parameters, their setting, in words what was found) of a T5's folder.

    Raises:
      ValueError: another architecture, no readable weights, or parameters that are missing, extra or
        misshapen, all of which are named.
    """
    path = pathlib.Path(path)
    config = json.loads((path / _CONFIG).read_text())
    with _open(path) as tensors:
        tied = _is_tied(path, config, tensors)
        t5 = names.read_config(path, config, tie_output=tied and names.scales_output(config))
        # Tied, but not scaled: an untied output layer that starts as the embedding.
        copied = tied and not t5.tie_output
        wanted = {
            name: tuple(reversed(shape)) if names.transposed(name) else shape
            for name, shape in t5_names.shapes(t5).items()
        }
        found = {name: shape for name, shape in tensors.shapes.items() if name not in names.IGNORED}
        if tied:
            found.pop(names.OUTPUT, None)
        if copied:
            found[names.OUTPUT] = found.get(names.EMBEDDING, ())
        t5_names.check(path, {names.their_name(k): v for k, v in wanted.items()}, found)

        def read(name: str) -> np.ndarray:
            theirs = names.their_name(name)
            if copied and theirs == names.OUTPUT:
                theirs = names.EMBEDDING
            array = tensors.read(theirs).astype(np.float32, copy=False)
            return array.T if names.transposed(name) else array

        params = t5_names.tree_from(t5, read)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    what = (
        f"a Hugging Face {config['model_type']} in {path} ({tensors.files}): {count:,} parameters, "
        f"{t5.num_encoder_layers} and {t5.num_decoder_layers} layers of width {t5.emb_dim}, "
        f"{config.get('feed_forward_proj', 'relu')}, output layer {'tied' if tied else 'of its own'}"
    )
    return params, t5_names.fid(t5), what


def save(folder: Any, params: Mapping[str, Any], config: GlimmerConfig) -> None:
    """Writes parameters of FiD as a Hugging Face T5: `config.json` and one float32 safetensors file.

    Raises:
      ValueError: the setting is not FiD, or its activations are not T5's.
    """
    if config.memory_layers or config.rerank_layers:
        raise ValueError(
            f"A Hugging Face T5 has one undivided encoder, and this setting has memory_layers="
            f"{config.memory_layers}, rerank_layers={config.rerank_layers}. Export with "
            "gin/models/fid.gin."
        )
    described = names.write_config(config.t5)
    tensors = {}
    for name, leaf in t5_names.flat_from(params).items():
        array = np.asarray(jax.device_get(leaf), np.float32)
        tensors[names.their_name(name)] = np.ascontiguousarray(
            array.T if names.transposed(name) else array
        )
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / _ONE, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def _is_tied(path: pathlib.Path, config: Mapping[str, Any], tensors: _Tensors) -> bool:
    if names.OUTPUT not in tensors.shapes or names.EMBEDDING not in tensors.shapes:
        return names.OUTPUT not in tensors.shapes
    if tensors.shapes[names.OUTPUT] == tensors.shapes[names.EMBEDDING] and np.array_equal(
        tensors.read(names.OUTPUT), tensors.read(names.EMBEDDING)
    ):
        return True
    if names.scales_output(config):
        raise ValueError(
            f"{path} has an output layer of its own, and config.json says that it is tied to the "
            'embedding. Set "tie_word_embeddings": false if the model is T5 v1.1, or remove '
            f"{names.OUTPUT}."
        )
    return False


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[_Tensors]:
    if (path / _INDEX).is_file():
        weight_map = json.loads((path / _INDEX).read_text())["weight_map"]
        missing = sorted({file for file in weight_map.values() if not (path / file).is_file()})
        if missing:
            raise ValueError(f"{path} lacks {missing}, which {_INDEX} names. Fetch them again.")
        with contextlib.ExitStack() as stack:
            yield _safetensors(path, sorted(set(weight_map.values())), stack)
    elif (path / _ONE).is_file():
        with contextlib.ExitStack() as stack:
            yield _safetensors(path, [_ONE], stack)
    elif (path / _FLAX).is_file():
        tree = flax.serialization.msgpack_restore((path / _FLAX).read_bytes())
        flat = flax.traverse_util.flatten_dict(tree)
        # Flax's kernels are not transposed.
        arrays = {
            names.torch_name(key): value.T if key[-1] == "kernel" else value
            for key, value in flat.items()
        }
        shapes = {name: tuple(value.shape) for name, value in arrays.items()}
        yield _Tensors(shapes, arrays.__getitem__, _FLAX)
    else:
        present = sorted(file.name for file in path.iterdir())
        raise ValueError(
            f"{path} has {_CONFIG} and neither {_ONE}, {_INDEX} nor {_FLAX}; it has {present}. Pickled "
            "weights (.bin, .pt) are not read, because reading them runs code: save the model with "
            "safe_serialization=True where it came from."
        )


def _safetensors(path: pathlib.Path, files: list[str], stack: contextlib.ExitStack) -> _Tensors:
    holders: dict[str, Any] = {}
    for file in files:
        opened = stack.enter_context(safetensors.safe_open(path / file, framework="numpy"))
        holders |= dict.fromkeys(opened.keys(), opened)
    shapes = {name: tuple(one.get_slice(name).get_shape()) for name, one in holders.items()}
    what = files[0] if len(files) == 1 else f"{len(files)} safetensors files"
    return _Tensors(shapes, lambda name: holders[name].get_tensor(name), what)
