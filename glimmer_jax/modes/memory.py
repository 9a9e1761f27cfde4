"""Mode `memory`: what to know of a memory store, and what to do with it, by `--action`."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.memory import edit, estimate, maintain, versions
from glimmer_jax.memory.build import BuildConfig
from glimmer_jax.memory.encoding import MemoryEncoder
from glimmer_jax.memory.fingerprint import passages_fingerprint
from glimmer_jax.memory.maintain import find, inspect, verify
from glimmer_jax.memory.manifest import Layout
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks
from glimmer_jax.modes.recipe import make_recipe
from glimmer_jax.partitioning import MeshConfig
from glimmer_jax.storage import folder
from glimmer_jax.vocabulary import Vocabulary

ACTIONS = ("plan", "inspect", "verify", "repair", "append", "withdraw", "merge")


def memory(
    action: str,
    memory_dir: str | None = None,
    model: GlimmerModel | None = None,
    checkpoint_path: str | None = None,
    passages_dir: str | None = None,
    num_passages: int | None = None,
    passage_tokens: float = 200.0,
    max_length: int = 304,
    batch_size: int = 32,
    layout: Layout = Layout(shard_passages=1024, chunk_tokens=64),
    device_tflops: float = 100.0,
    passage: int | str | None = None,
    version: int | None = None,
    verify_shards: int | None = None,
    replace: bool = False,
    accept_other_program: bool = False,
    ids: Sequence[int] = (),
    parts: Sequence[str] = (),
    mesh: MeshConfig = MeshConfig(),
    vocabulary: Vocabulary = Vocabulary(),
) -> None:
    """Does one thing with the store at `memory_dir` and prints what came of it.

    Args:
      action: plan (cost of a memory that is not there yet), inspect, verify (checksums), repair
        (rebuild damaged shards), append (passages that the store lacks), withdraw (passages by id),
        merge (`parts` into `memory_dir`).
      memory_dir: a folder or a TensorStore URL.
      model: for plan, repair and append.
      checkpoint_path: for repair and append; the one that the memory was made with.
      passages_dir: for repair and append; for plan instead of `num_passages`.
      num_passages: for plan.
      passage_tokens: for plan with `num_passages`; of a passage on average.
      max_length: P; for repair and append, that of the store.
      batch_size: passages a device encodes at once; for repair, that of the store.
      layout: of new shards.
      device_tflops: for plan; what a device sustains.
      passage: for inspect; an id or a title to look for.
      version: for inspect and verify; an earlier version of the store.
      verify_shards: for verify; read as many shards, evenly spaced, not all.
      replace: for append; take passages whose text has changed, or that were withdrawn.
      accept_other_program: for append; add what another program than the store's own computes.
      ids: for withdraw.
      parts: for merge; stores.
      mesh: devices.
      vocabulary: that of the model.

    Raises:
      ValueError: an unknown action, settings that it lacks, files that do not fit together, or
        damage found by verify.
    """
    if action not in ACTIONS:
        raise ValueError(f"ACTION must be one of {', '.join(ACTIONS)}; got {action!r}.")
    if action in ("plan", "repair", "append") and model is None:
        raise ValueError(
            f"--action={action} needs a model: give gin/runs/memory.gin first, then a size "
            "(gin/sizes) and the model (gin/models)."
        )
    if action != "plan":
        checks.required(MEMORY_DIR=memory_dir)

    def recipe() -> tuple[MemoryEncoder, Passages]:
        checks.required(CHECKPOINT_PATH=checkpoint_path, PASSAGES_DIR=passages_dir)
        assert model is not None
        corpus = Passages.open(str(passages_dir), vocabulary.fingerprint)
        corpus.verify()
        made, _ = make_recipe(
            model, str(checkpoint_path), vocabulary.fingerprint, mesh, max_length, batch_size
        )
        return made, corpus

    def plan_memory() -> Any:
        count, tokens = num_passages or 0, passage_tokens
        if passages_dir is not None:
            corpus = Passages.open(passages_dir, vocabulary.fingerprint)
            count, tokens = len(corpus), corpus.manifest["num_tokens"] / len(corpus)
        assert model is not None
        return estimate.plan(
            model.config,
            passages=count,
            tokens=tokens,
            layout=layout,
            device_tflops=device_tflops,
        )

    def inspect_memory() -> Any:
        store = MemoryStore.open(str(memory_dir), version=version)
        return inspect(store) if passage is None else find(store, passage)

    def verify_memory() -> Any:
        if problems := verify(str(memory_dir), verify_shards, version):
            raise ValueError(
                f"{memory_dir} is damaged: {'; '.join(problems)}. Repair it with --action=repair."
            )
        found = versions.read_manifest(folder.open_folder(str(memory_dir)), version)
        shards = len(found.shards)
        read = shards if verify_shards is None else min(verify_shards, shards)
        return {
            "verified": str(memory_dir),
            "version": found.version,
            "shards": shards,
            "shards_read": read,
        }

    def repair_memory() -> Any:
        made, corpus = recipe()
        fingerprint = passages_fingerprint(corpus.manifest)
        path = str(memory_dir)
        return {"rebuilt": maintain.repair(made, corpus, path, passages_fingerprint=fingerprint)}

    def append_passages() -> Any:
        made, corpus = recipe()
        edit.append(
            made,
            corpus,
            str(memory_dir),
            passages_fingerprint=passages_fingerprint(corpus.manifest),
            config=BuildConfig(layout, accept_other_program),
            replace=replace,
        )
        return inspect(MemoryStore.open(str(memory_dir)))

    def withdraw_passages() -> Any:
        wanted = _several("IDS", ids, int)
        checks.required(IDS=wanted or None)
        if not 0 <= min(wanted) <= max(wanted) < 2**63:
            raise ValueError(
                f"IDS are passage ids, from 0 to 2**63 - 1; got {min(wanted)} to {max(wanted)}."
            )
        edit.withdraw(str(memory_dir), wanted)
        return inspect(MemoryStore.open(str(memory_dir)))

    def merge_stores() -> Any:
        edit.merge(_several("PARTS", parts, str), str(memory_dir))
        return inspect(MemoryStore.open(str(memory_dir)))

    run: dict[str, Callable[[], Any]] = {
        "plan": plan_memory,
        "inspect": inspect_memory,
        "verify": verify_memory,
        "repair": repair_memory,
        "append": append_passages,
        "withdraw": withdraw_passages,
        "merge": merge_stores,
    }
    print(json.dumps(run[action](), indent=1))


def _several(name: str, values: Any, kind: type) -> list[Any]:
    """A list from the command line; raises ValueError for what is none."""
    if isinstance(values, str | int) or not all(isinstance(value, kind) for value in values):
        example = [0, 1] if kind is int else ["one", "another"]
        raise ValueError(f"{name} is a list, for example --gin.{name}={example!r}; got {values!r}.")
    return list(values)
