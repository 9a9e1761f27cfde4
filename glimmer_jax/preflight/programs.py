"""The program that each job runs on its devices, with shapes in place of arrays."""

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
from glimmer_jax.serving.step import predict_step
from glimmer_jax.training.optimizer import make_optimizer
from glimmer_jax.training.state import abstract_state, state_shardings
from glimmer_jax.training.step import jit_train_step, make_train_step

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """What a job compiles: a jitted function and the shapes that it is called with."""

    function: Any  # jitted
    arguments: tuple[Any, ...]  # trees of ShapeDtypeStructs with shardings
    kinds: dict[str, Any]  # parts of the arguments by what they are
    while_trips: int = 1  # of loops that end when the answer does

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes on each device of what the program is given."""
        return {kind: bytes_on_device(tree) for kind, tree in self.kinds.items()}


def bytes_on_device(tree: Any) -> int:
    """Of a tree of ShapeDtypeStructs with shardings."""
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
    """A batch of questions to answers, from memory where there is one, as `Predictor` prepares it."""
    platform = mesh.devices.flat[0].platform
    model = param_layout.unrolled(settings["model"], platform)
    lengths = check_lengths(settings["task_feature_lengths"])
    from_memory = settings.get("memory_dir") is not None
    batch = batch_shapes(model, lengths, settings["batch_size"], mesh, from_memory)
    rows = settings["batch_size"] * model.decode.beams
    params = parameter_shapes(model, mesh)
    laid_out = jax.eval_shape(lambda p: param_layout.lay_out(model, p, rows, platform), params)
    params = jax.tree.map(_shape, laid_out, jax.tree.map(lambda leaf: leaf.sharding, params))
    number = jax.ShapeDtypeStruct((), jnp.uint32, sharding=partitioning.replicated(mesh))
    kinds = {"parameters": params, "batch": batch}
    return Program(predict_step(model), (params, batch, number, number), kinds, lengths.target)


def build_memory(settings: Settings, mesh: Mesh) -> Program:
    """Passages of the longest bucket to memory; every device has all parameters and its own rows."""
    model, rows = settings["model"], settings["batch_size"] * mesh.size
    whole = partitioning.replicated(mesh)
    params = jax.tree.map(lambda leaf: _shape(leaf, whole), model.abstract_variables()[0])
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    tokens = jax.ShapeDtypeStruct((rows, settings["max_length"]), jnp.int32, sharding=spread)
    step = encoding.encode_step(model.memory_states, mesh, model.config.memory_codec)
    return Program(step, (params, tokens), {"parameters": params, "batch": tokens})


def lookup(settings: Settings, mesh: Mesh) -> Program | None:
    """A batch's passages out of a table that fills what it may; None for a job without one."""
    room = settings.get("memory_bytes_per_device") or 0
    if settings.get("memory_dir") is None or not room:
        return None
    model = settings["model"]
    lengths = check_lengths(settings["task_feature_lengths"])
    specs = model.memory_specs()
    # Passages as long as they may be; of each, every device knows first page and length.
    pages_a_row = -(-lengths.passage // table.PAGE_TOKENS)
    page_bytes = table.PAGE_TOKENS * table.token_bytes(specs) + 8 * mesh.size / pages_a_row
    pages = max(int(room / page_bytes), 1) * mesh.size
    rows = max(pages // pages_a_row, 1)
    spread = NamedSharding(mesh, partitioning.spec((axes.MEMORY_ROWS,)))
    whole = partitioning.replicated(mesh)
    number: Any = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=whole)
    page: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((pages, table.PAGE_TOKENS, *trailing), dtype, sharding=spread)
        for name, (trailing, dtype) in specs.items()
    }
    memory = table.Table(page, number, number)
    wanted = (settings["batch_size"], lengths.passages)
    function = jax.jit(functools.partial(table.lookup, length=lengths.passage, mesh=mesh))
    arguments = (memory, jax.ShapeDtypeStruct(wanted, jnp.int32, sharding=whole))
    return Program(function, arguments, {"memory_table": memory})


JOBS: dict[str, Callable[[Settings, Mesh], Program]] = {
    "train": train,
    "build_memory": build_memory,
    "eval": answer,
    "infer": answer,
}


def parameter_shapes(model: GlimmerModel, mesh: Mesh) -> Any:
    """Shapes of the parameters as `weights.parameters.place` puts them on a mesh."""
    shapes, names = model.abstract_variables()
    partitioning.check_divisible(shapes, names, mesh)
    return jax.tree.map(_shape, shapes, partitioning.shardings(names, mesh))


def _shape(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def batch_shapes(
    model: GlimmerModel, lengths: Lengths, rows: int, mesh: Mesh, from_memory: bool
) -> dict[str, Any]:
    """Shapes of a batch of the contract in `models.model`, as `put_batch` lays it."""
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
