"""Mode `memory`: plans, inspects, verifies and edits memory stores; one function per `--action`."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from glimmer_jax.corpus.ids import id_number
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.memory import edit, estimate, maintain, versions
from glimmer_jax.memory.build import BuildConfig
from glimmer_jax.memory.fingerprint import passages_fingerprint
from glimmer_jax.memory.manifest import Layout
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.modes import checks
from glimmer_jax.modes.memory_encoder import load_encoder, open_corpus
from glimmer_jax.modes.settings import EncoderConfig
from glimmer_jax.storage import folder


def memory(action: str, actions: Mapping[str, Callable[[], Any]]) -> None:
    """Runs one action and prints its result as JSON.

    Args:
      action: a key of `actions`.
      actions: the functions below, by name, with their settings bound.

    Raises:
      ValueError: an unknown action, or from the action itself.
    """
    if action not in actions:
        raise ValueError(f"ACTION must be one of {', '.join(actions)}; got {action!r}.")
    print(json.dumps(actions[action](), indent=1))


def plan(
    model: GlimmerModel | None,
    passages_dir: str | None = None,
    num_passages: int | None = None,
    passage_tokens: float = 200.0,
    layout: Layout = Layout(),
    device_tflops: float = 100.0,
) -> Any:
    """Size and cost of a memory that does not exist yet.

    Args:
      model: with a memory encoder.
      passages_dir: a corpus; or
      num_passages: number of passages, with `passage_tokens` tokens each on average.
      passage_tokens: see above.
      layout: of the shards.
      device_tflops: sustained rate of a device.

    Raises:
      ValueError: there is no model, or no number of passages.
    """
    if model is None:
        raise ValueError(
            "--action=plan needs a model: give a size (gin/sizes) and the model (gin/models) with "
            "--gin_file."
        )
    count, tokens = num_passages or 0, passage_tokens
    if passages_dir is not None:
        corpus = Passages.open(passages_dir)
        count, tokens = len(corpus), corpus.manifest["num_tokens"] / len(corpus)
    return estimate.plan(
        model.config, passages=count, tokens=tokens, layout=layout, device_tflops=device_tflops
    )


def inspect(
    memory_dir: str | None, passage: int | str | None = None, version: int | None = None
) -> Any:
    """The content of the store, or the place of a passage, given by id or title.

    Raises:
      ValueError: there is no such store, version or passage.
    """
    checks.required(MEMORY_DIR=memory_dir)
    store = MemoryStore.open(str(memory_dir), version=version)
    if passage is None:
        return maintain.inspect(store)
    number = id_number(passage)
    if isinstance(passage, str) and (store.ids == number).any():
        return [{**line, "id": passage} for line in maintain.find(store, number)]
    return maintain.find(store, passage)


def verify(
    memory_dir: str | None, version: int | None = None, verify_shards: int | None = None
) -> Any:
    """Compares the store's files with their checksums.

    Args:
      memory_dir: a folder or a TensorStore URL.
      version: None for the newest.
      verify_shards: number of evenly spaced shards to read; None for all.

    Raises:
      ValueError: a file is missing or damaged.
    """
    checks.required(MEMORY_DIR=memory_dir)
    if problems := maintain.verify(str(memory_dir), verify_shards, version):
        raise ValueError(
            f"{memory_dir} is damaged: {'; '.join(problems)}. Repair it with --action=repair."
        )
    manifest = versions.read_manifest(folder.open_folder(str(memory_dir)), version)
    shards = len(manifest.shards)
    return {
        "verified": str(memory_dir),
        "version": manifest.version,
        "shards": shards,
        "shards_read": shards if verify_shards is None else min(verify_shards, shards),
    }


def repair(encoder: EncoderConfig, memory_dir: str | None) -> Any:
    """Rebuilds damaged shards with the checkpoint that the memory was built from.

    Raises:
      ValueError: a setting is missing, or checkpoint and passages are not those of the store.
    """
    checks.required(MEMORY_DIR=memory_dir)
    trained, corpus = open_corpus(encoder)
    memory_encoder, _ = load_encoder(encoder, trained, corpus)
    fingerprint = passages_fingerprint(corpus.manifest)
    path = str(memory_dir)
    return {
        "rebuilt": maintain.repair(memory_encoder, corpus, path, passages_fingerprint=fingerprint)
    }


def append(
    encoder: EncoderConfig,
    memory_dir: str | None,
    layout: Layout = Layout(),
    replace: bool = False,
    accept_other_program: bool = False,
) -> Any:
    """Adds the passages that the store lacks.

    Args:
      encoder: the checkpoint that the memory was built from, and all passages.
      memory_dir: a folder or a TensorStore URL.
      layout: of the new shards.
      replace: also replace passages whose text has changed, and restore withdrawn ones.
      accept_other_program: append although another program (rows, backend) built the store.

    Raises:
      ValueError: a setting is missing, or the checkpoint is not the store's.
    """
    checks.required(MEMORY_DIR=memory_dir)
    trained, corpus = open_corpus(encoder)
    memory_encoder, _ = load_encoder(encoder, trained, corpus)
    edit.append(
        memory_encoder,
        corpus,
        str(memory_dir),
        passages_fingerprint=passages_fingerprint(corpus.manifest),
        config=BuildConfig(layout, accept_other_program),
        replace=replace,
    )
    return inspect(memory_dir)


def withdraw(memory_dir: str | None, ids: Sequence[int | str]) -> Any:
    """Removes passages by id.

    Raises:
      ValueError: IDS is no list of ids, or the store lacks one.
    """
    checks.required(MEMORY_DIR=memory_dir)
    names = _checked_list("IDS", ids, (int, str))
    checks.required(IDS=names or None)
    try:
        numbers = np.array([id_number(name) for name in names])
    except ValueError as error:
        raise ValueError(f"IDS: {error}") from None
    present = np.isin(numbers, MemoryStore.open(str(memory_dir)).ids)
    if not present.all():
        missing = [name for name, found in zip(names, present, strict=True) if not found]
        raise ValueError(
            f"IDS: {len(missing)} of {len(names)} passages are not in the memory {memory_dir}: "
            f"{', '.join(map(repr, missing[:3]))}. Give ids as the corpus has them; "
            "--action=inspect --gin.PASSAGE=\"'a title'\" shows them; IDS also takes its `number`."
        )
    edit.withdraw(str(memory_dir), numbers.tolist())
    return inspect(memory_dir)


def merge(memory_dir: str | None, parts: Sequence[str]) -> Any:
    """Merges the stores `parts` into a new store at `memory_dir`.

    Raises:
      ValueError: PARTS is no list of stores, or they do not belong together.
    """
    checks.required(MEMORY_DIR=memory_dir)
    edit.merge(_checked_list("PARTS", parts, str), str(memory_dir))
    return inspect(memory_dir)


def _checked_list(name: str, values: Any, kind: type | tuple[type, ...]) -> list[Any]:
    """A list from the command line; raises ValueError for another value."""
    listed = isinstance(values, list | tuple | set)
    if not listed or not all(isinstance(value, kind) for value in values):
        example = [0, 1] if kind is not str else ["runs/a", "runs/b"]
        raise ValueError(
            f"{name} must be a list, such as --gin.{name}={example!r}; got {values!r}."
        )
    return list(values)
