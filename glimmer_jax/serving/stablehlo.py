"""The program that answers questions as StableHLO, for machines with JAX but without this project.

`jax.export` also needs `flatbuffers`, to read its own files. An exported folder has:

    manifest.json           arguments, results, lengths, platforms, fingerprints, SHA-256 of the files
    params.npz              parameters, float32, by their paths, layers unrolled (`serving.param_layout`)
    program-<LENGTHS>.bin   one for each bucket of lengths, for any number of questions

Parameters are arguments of the programs, not constants in them: all buckets and platforms share one
copy, which is placed once, and a program stays below the 2 GB of a flatbuffer, the format of
`jax.export`. They are an `.npz` because JAX depends on NumPy, and float32 so that answers equal the
checkpoint's. docs/serving.md has the calling convention.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from glimmer_jax.axes import Lengths, check_lengths
from glimmer_jax.memory.fingerprint import encoder_fingerprint
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.serving import param_layout
from glimmer_jax.storage import folder

FORMAT_VERSION = 1
PROGRAMS = "OUTPUT_PATH (of programs)"  # the setting, in messages
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class ProgramConfig:
    """The programs to export beside the parameters."""

    # `TASK_FEATURE_LENGTHS` of each program: {"inputs": Q, "targets": T, "passages": (K, P)}.
    buckets: Sequence[Mapping[str, Any]]
    from_memory: bool = True  # passages come as memory; else as tokens
    platforms: Sequence[str] = ("cpu", "cuda", "tpu")  # that each program is lowered for

    def __post_init__(self):
        if isinstance(self.platforms, str) or not self.platforms:
            raise ValueError(f"PLATFORMS is a list such as ['cpu'], got {self.platforms!r}.")
        if unknown := sorted(set(self.platforms) - set(PLATFORMS)):
            raise ValueError(f"PLATFORMS may be {', '.join(PLATFORMS)}; got {unknown}.")
        if isinstance(self.buckets, Mapping) or not self.buckets:
            raise ValueError(
                f"BUCKETS is a list of TASK_FEATURE_LENGTHS, one for each program; got {self.buckets!r}."
            )

    def lengths(self) -> list[Lengths]:
        """The checked lengths of each bucket. Raises ValueError for invalid lengths."""
        return [check_lengths(bucket) for bucket in self.buckets]


def check_new_folder(path: Any) -> None:
    """Raises ValueError if the folder of an export exists, or is in a bucket."""
    target = folder.local(PROGRAMS, path)
    if target.exists():
        raise ValueError(f"OUTPUT_PATH: {target} exists. Give a new folder.")


def export_program(
    path: Any, model: GlimmerModel, params: Any, config: ProgramConfig, vocabulary: str
) -> None:
    """Writes the folder described above.

    Args:
      path: of the new folder, on a local disk.
      model: FiD, LUMEN or GLIMMER, with its decoding.
      params: its parameters, a nested dict.
      config: lengths and platforms.
      vocabulary: fingerprint of the model's vocabulary.

    Raises:
      ValueError: the folder exists, or the program needs memory that the model does not have.
    """
    check_new_folder(path)
    target = folder.local(PROGRAMS, path)
    if config.from_memory and not model.config.memory_layers:
        raise ValueError(
            "FROM_MEMORY: FiD has no memory. Set it to False, or export LUMEN or GLIMMER."
        )
    # One program serves all platforms, so its layout is that of none of them.
    unrolled = param_layout.unrolled(model, "any")
    flat = flax.traverse_util.flatten_dict(param_layout.unstack(model, params), sep="/")
    flat = {name: np.asarray(leaf) for name, leaf in flat.items()}
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat.items()}
    programs = {
        f"program-Q{bucket.question}-T{bucket.target}-K{bucket.passages}-P{bucket.passage}.bin": bucket
        for bucket in config.lengths()
    }
    exported = {
        name: _trace(unrolled, shapes, bucket, config.from_memory, config.platforms)
        for name, bucket in programs.items()
    }

    # The folder gets its name once it is complete.
    unfinished = target.with_name(target.name + ".unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    np.savez(unfinished / "params.npz", **flat)
    for name, program in exported.items():
        (unfinished / name).write_bytes(program.serialize())
    manifest = {
        "format_version": FORMAT_VERSION,
        "jax_version": jax.__version__,
        "platforms": list(config.platforms),
        "programs": {
            name: {
                "lengths": bucket._asdict(),
                "arguments": _described(exported[name].in_tree, exported[name].in_avals)[0][1],
                "results": _described(exported[name].out_tree, exported[name].out_avals),
            }
            for name, bucket in programs.items()
        },
        "decode": dataclasses.asdict(model.decode),
        "eos_id": model.eos_id,
        "vocabulary_fingerprint": vocabulary,
        "encoder_fingerprint": encoder_fingerprint(params, model.config)
        if model.config.memory_layers
        else None,
        "memory_codec": model.config.memory_codec if config.from_memory else None,
        "sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(unfinished.iterdir())
        },
    }
    (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    # Synced before the rename: a power cut must not leave the name without the bytes.
    for part in (*unfinished.iterdir(), unfinished):
        folder.sync(part)
    unfinished.rename(target)
    folder.sync(target.parent)


def arguments(
    model: GlimmerModel, lengths: Lengths, from_memory: bool, batch: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays that a program takes besides the parameters, for `batch` questions."""
    count, length = lengths.passages, lengths.passage
    shapes = {"question_tokens": jax.ShapeDtypeStruct((batch, lengths.question), jnp.int32)}
    if from_memory:
        for name, (trailing, dtype) in model.memory_specs().items():
            shape = (batch, count, length, *trailing)
            shapes[f"passage_memory/{name}"] = jax.ShapeDtypeStruct(shape, dtype)
        shapes["passage_lengths"] = jax.ShapeDtypeStruct((batch, count), jnp.int32)
    else:
        shapes["passage_tokens"] = jax.ShapeDtypeStruct((batch, count, length), jnp.int32)
    if model.decode.temperature:
        shapes["seed"] = jax.ShapeDtypeStruct((), jnp.uint32)
    return shapes


def _trace(
    model: GlimmerModel,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    lengths: Lengths,
    from_memory: bool,
    platforms: Sequence[str],
) -> jax.export.Exported:
    def program(flat: dict[str, jax.Array], given: dict[str, jax.Array]) -> dict[str, jax.Array]:
        params = flax.traverse_util.unflatten_dict(flat, sep="/")
        batch = flax.traverse_util.unflatten_dict(given, sep="/")
        seed = batch.pop("seed", None)
        rows = batch["question_tokens"].shape[0]
        batch["decoder_input_tokens"] = jnp.zeros((rows, lengths.target), jnp.int32)
        rng = None if seed is None else jax.random.key(seed)
        answers, aux = model.predict_batch_with_aux(params, batch, rng)
        return {"answers": answers, **aux}

    (batch,) = jax.export.symbolic_shape("batch")
    given = arguments(model, lengths, from_memory, batch)
    return jax.export.export(jax.jit(program), platforms=tuple(platforms))(dict(shapes), given)


def _described(tree: Any, avals: Sequence[Any]) -> Any:
    """Each array as text, such as `int32[batch,32]`."""
    described = [f"{one.dtype}[{','.join(str(size) for size in one.shape)}]" for one in avals]
    return jax.tree.unflatten(tree, described)
