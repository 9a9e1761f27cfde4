"""Fingerprints of the encoder and of the passages that a memory was built from.

The encoder's fingerprint covers exactly the parameters that memory depends on: the embedding, layers
[0, M) and their position table, the settings of the layers, and the codec's codebooks if it has any.
It is the same for scanned and unrolled stacks and on any mesh.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils

from glimmer_jax.models.glimmer import GlimmerConfig

_UNROLLED = re.compile(r"layers_(\d+)")


def encoder_fingerprint(params: Mapping[str, Any], config: GlimmerConfig) -> str:
    """`sha256:...` over names, shapes, dtypes and bytes of the memory encoder's parameters.

    Args:
      params: the model's parameters, a plain nested dictionary of arrays.
      config: of the model; the settings that the encoder depends on are covered.

    Raises:
      ValueError: `params` have no memory encoder.
    """
    embedder = "memory_embedder" if "memory_embedder" in params else "token_embedder"
    for part in (embedder, "memory_encoder"):
        if part not in params:
            raise ValueError(
                f"A memory needs the parameters {part!r}; these have {sorted(params)}. A model "
                "without memory layers (FiD) has no memory to build."
            )
    digest = hashlib.sha256(json.dumps(config.t5.semantics(), sort_keys=True).encode())
    # One name for the embedding: a frozen copy that equals the live table has its fingerprint.
    _update(digest, "embedding", _on_host(params[embedder]["embedding"]))
    encoder = dict(params["memory_encoder"])
    # A table shared with the live layers is stored there, but the memory depends on it too.
    encoder.setdefault("relpos_bias", params.get("live_encoder", {}).get("relpos_bias", {}))
    for name, leaf in sorted(_canonical(encoder), key=lambda item: item[0]):
        _update(digest, name, leaf)
    if config.has_codebooks:
        for name, leaf in sorted(params["memory_codebooks"].items()):
            _update(digest, f"codebooks/{name}", _on_host(leaf))
    return f"sha256:{digest.hexdigest()}"


def passages_fingerprint(manifest: Mapping[str, Any]) -> str:
    """`sha256:...` over ids and tokens of a passages folder, from the checksums in its manifest."""
    return files_fingerprint(manifest, ("ids.npy", "offsets.npy", "tokens.npy"))


def files_fingerprint(manifest: Mapping[str, Any], names: Sequence[str]) -> str:
    """`sha256:...` over some files of a passages folder, from the checksums in its manifest."""
    sums = json.dumps([manifest["files"][name]["sha256"] for name in names])
    return f"sha256:{hashlib.sha256(sums.encode()).hexdigest()}"


def _update(digest: Any, name: str, leaf: Any) -> None:
    array = np.ascontiguousarray(leaf)
    digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
    # bfloat16 has no buffer interface of its own.
    digest.update(array.reshape(-1).view(np.uint8).data)


def _canonical(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Leaves by name; each layer of a stack is one leaf, named `layers/0007/...`."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = [str(entry.key) for entry in path]
        array = _on_host(leaf)
        unrolled = [_UNROLLED.fullmatch(key) for key in keys]
        if "layers" in keys:
            at = keys.index("layers")
            for layer in range(array.shape[0]):
                name = "/".join([*keys[:at], "layers", f"{layer:04d}", *keys[at + 1 :]])
                yield name, array[layer]
        elif any(unrolled):
            at = next(i for i, match in enumerate(unrolled) if match)
            layer = int(keys[at].removeprefix("layers_"))
            yield "/".join([*keys[:at], "layers", f"{layer:04d}", *keys[at + 1 :]]), array
        else:
            yield "/".join(keys), array


def _on_host(leaf: Any) -> Any:
    if isinstance(leaf, ts.TensorStore):
        return leaf  # read when it is hashed
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
