"""The arrays of an Orbax folder, opened without being read.

Orbax restores into a tree of the same shape. Public weights change shape on the way (layers are cut
out of stacks, and stacked anew), so its arrays are opened one by one, as the zarr arrays they are.
"""

import json
from typing import Any

import tensorstore as ts

from glimmer_jax import folder
from glimmer_jax.weights.raw import exists
from glimmer_jax.weights.zarr_arrays import opened

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
