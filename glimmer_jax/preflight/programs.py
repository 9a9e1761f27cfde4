"""The programs that jobs run on devices, with shapes instead of arrays."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glimmer_jax import axes, partitioning
from glimmer_jax.axes import Lengths, check_lengths
from glimmer_jax.memory import encoding, table
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.serving import param_layout
from glimmer_jax.serving import step as serving_step
from glimmer_jax.training.optimizer import make_optimizer
from glimmer_jax.training.state import abstract_state, state_shardings
from glimmer_jax.training.step import jit_train_step, make_train_step

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the shapes of its arguments; a job may run several, one after the other."""

    function: Any  # jitted
    arguments: tuple[Any, ...]  # trees of ShapeDtypeStructs with shardings
    kinds: dict[str, Any]  # the arguments by kind
    while_trips: int = 1  # maximum iterations of loops without a static length
    then: Callable[[Any], "Program"] | None = None  # the next program, from this one's results

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes per device of each kind of argument."""
        return {kind: bytes_on_device(tree) for kind, tree in self.kinds.items()}


def bytes_on_device(tree: Any) -> int:
    """Bytes per device of a tree of ShapeDtypeStructs with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += jnp.dtype(leaf.dtype).itemsize * math.prod(shape)
    return total


def train(settings: Settings, mesh: Mesh) -> Program:
    """One training step: loss, gradient, update."""
    model, loop = settings["model"], settings["loop_config"]
    lengths = check_lengths(settings["task_feature_lengths"])
    shapes, names = model.abstract_variables()
    optimizer = make_optimizer(settings["optimizer"], names, model.frozen(shapes))
    state = abstract_state(optimizer, shapes, mesh)
    step = jit_train_step(
        make_train_step(model, optimizer, loop.num_microbatches, loop.seed),
        state_shardings(optimizer, shapes, mesh),
        mesh,
    )
    from_memory = settings.get("memory_dir") is not None
    batch = batch_shapes(model, lengths, settings["batch_size"], mesh, from_memory)
    kinds = {"parameters": state.params, "optimiser": state.opt_state, "batch": batch}
    return Program(step, (state, batch), kinds)


def answer(settings: Settings, mesh: Mesh) -> Program:
    """Answers to a batch of questions, from memory if `memory_dir` is set; the programs of serving."""
    platform = mesh.devices.flat[0].platform
    model = param_layout.unrolled(settings["model"], platform)
    lengths = check_lengths(settings["task_feature_lengths"])
    from_memory = settings.get("memory_dir") is not None
    batch = batch_shapes(model, lengths, settings["batch_size"], mesh, from_memory)
    batch = {name: shape for name, shape in batch.items() if name in serving_step.READ}
    rows = settings["batch_size"] * model.decode.beams
    params = parameter_shapes(model, mesh)
    laid_out = jax.eval_shape(lambda p: param_layout.lay_out(model, p, rows, platform), params)
    params = jax.tree.map(_shape, laid_out, jax.tree.map(lambda leaf: leaf.sharding, params))
    seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=partitioning.replicated(mesh))

    def decode(results: Any) -> Program:
        encoded, mask, _ = results
        return Program(
            serving_step.answer_step(model),
            (params, encoded, mask, None, seed, seed, lengths.target),
            {"parameters": params, "encoded": (encoded, mask)},
            lengths.target,
        )

    kinds = {"parameters": params, "batch": batch}
    return Program(serving_step.read_step(model), (params, batch), kinds, then=decode)


def build_memory(settings: Settings, mesh: Mesh) -> Program:
    """Memory of passages of the longest bucket, on replicated parameters and sharded rows."""
    model, rows = settings["model"], settings["batch_size"] * mesh.size
    whole = partitioning.replicated(mesh)
    params = jax.tree.map(lambda leaf: _shape(leaf, whole), model.abstract_variables()[0])
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    tokens = jax.ShapeDtypeStruct((rows, settings["max_length"]), jnp.int32, sharding=spread)
    step = encoding.encode_step(model.memory_states, mesh, model.config.memory_codec)
    return Program(step, (params, tokens), {"parameters": params, "batch": tokens})


def lookup(settings: Settings, mesh: Mesh) -> Program | None:
    """Lookup of a batch in a table that fills `memory_bytes_per_device`; None without a table."""
    room = settings.get("memory_bytes_per_device") or 0
    if settings.get("memory_dir") is None or not room:
        return None
    model = settings["model"]
    lengths = check_lengths(settings["task_feature_lengths"])
    specs = model.memory_specs()
    # Passages of maximum length; every device holds the first page and the length of each passage.
    pages_per_passage = -(-lengths.passage // table.PAGE_TOKENS)
    page_bytes = table.PAGE_TOKENS * table.token_bytes(specs) + 8 * mesh.size / pages_per_passage
    pages = max(int(room / page_bytes), 1) * mesh.size
    rows = max(pages // pages_per_passage, 1)
    sharded = NamedSharding(mesh, partitioning.spec((axes.MEMORY_ROWS,)))
    replicated = partitioning.replicated(mesh)
    numbers: Any = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=replicated)
    page: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((pages, table.PAGE_TOKENS, *trailing), dtype, sharding=sharded)
        for name, (trailing, dtype) in specs.items()
    }
    memory = table.Table(page, numbers, numbers)
    shape = (settings["batch_size"], lengths.passages)
    function = jax.jit(functools.partial(table.lookup, length=lengths.passage, mesh=mesh))
    arguments = (memory, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated))
    return Program(function, arguments, {"memory_table": memory})


JOBS: dict[str, Callable[[Settings, Mesh], Program]] = {
    "train": train,
    "build_memory": build_memory,
    "eval": answer,
    "infer": answer,
}


def parameter_shapes(model: GlimmerModel, mesh: Mesh) -> Any:
    """Shapes of the parameters, sharded as by `weights.parameters.place`."""
    shapes, names = model.abstract_variables()
    partitioning.check_divisible(shapes, names, mesh)
    return jax.tree.map(_shape, shapes, partitioning.shardings(names, mesh))


def _shape(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def batch_shapes(
    model: GlimmerModel, lengths: Lengths, rows: int, mesh: Mesh, from_memory: bool
) -> dict[str, Any]:
    """Shapes of a batch (see `models.model`), sharded as by `put_batch`."""
    passages = (rows, lengths.passages)
    targets = (rows, lengths.target)
    shapes: dict[str, Any] = {
        "question_tokens": ((rows, lengths.question), jnp.int32),
        "decoder_input_tokens": (targets, jnp.int32),
        "decoder_target_tokens": (targets, jnp.int32),
        "decoder_loss_weights": (targets, jnp.float32),
    }
    if model.loss.supervised_weight:
        shapes["gold_passages"] = (passages, jnp.int32)
    if from_memory:
        shapes["passage_lengths"] = (passages, jnp.int32)
    else:
        shapes["passage_tokens"] = ((*passages, lengths.passage), jnp.int32)
    batch: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()
    }
    if from_memory:
        batch["passage_memory"] = {
            name: jax.ShapeDtypeStruct((*passages, lengths.passage, *trailing), dtype)
            for name, (trailing, dtype) in model.memory_specs().items()
        }
    return jax.tree.map(_shape, batch, partitioning.batch_shardings(batch, mesh))
