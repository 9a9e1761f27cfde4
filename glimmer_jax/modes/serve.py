"""Mode `serve`: answers over HTTP, and a page to ask questions."""

from collections.abc import Mapping, Sequence
from typing import Any

from glimmer_jax import axes, partitioning
from glimmer_jax.modes import checks
from glimmer_jax.modes.settings import AnsweringConfig, CorpusConfig
from glimmer_jax.retrieval.config import RetrieverConfig
from glimmer_jax.runtime.preemption import STOP
from glimmer_jax.server.config import ServerConfig


def serve(
    reader: AnsweringConfig,
    task_feature_lengths: Mapping[str, Any] | None,
    batch_size: int,
    corpus: CorpusConfig,
    server: ServerConfig = ServerConfig(),
    kept_choices: Sequence[int] = (),
    retriever: RetrieverConfig = RetrieverConfig(),
) -> None:
    """Serves until SIGTERM or Ctrl-C, then answers the requests under way; see docs/serving.md.

    Args:
      reader: the model and its checkpoint.
      task_feature_lengths: `{"inputs": Q, "targets": T, "passages": (K, P)}`; None: the checkpoint's.
      batch_size: largest number of questions per batch, over all devices; smaller batches are
        compiled too (`batch_sizes`).
      corpus: titles, texts, retrieval, and tokens if there is no memory.
      server: address, access and operation.
      kept_choices: further values of m that requests may choose; each is compiled at the start.
      retriever: of questions without `retrieved`.

    Raises:
      ValueError: settings or files that do not fit together, a missing library, or an address that
        cannot be bound.
    """
    checks.required(CHECKPOINT_PATH=reader.checkpoint_path, PASSAGES_DIR=corpus.passages_dir)
    from glimmer_jax.server import app, engine, run

    retriever.check()
    answering = reader.prepare(corpus, task_feature_lengths, batch_size)
    token = server.token()
    listener = run.bind(server.host, server.port)
    smallest = partitioning.parts(answering.mesh.shape, axes.BATCH)
    predictor = reader.load(answering, corpus, batch_sizes(smallest, batch_size), retriever)
    kept = dict.fromkeys((predictor.num_kept, *kept_choices))
    answers = engine.PredictorEngine(predictor, tuple(kept), server.max_candidates)
    served = app.Server(answers, answers.limits(), server, token)
    run.run(served, listener, answers.warm_up, lambda: STOP.requested, server.drain_timeout)


def batch_sizes(smallest: int, largest: int) -> list[int]:
    """Ascending sizes, each half of the next one as long as `smallest` divides it.

    On a CPU the time of a batch grows with its size, so that two questions in a batch for eight take
    as long as eight.
    """
    sizes = [largest]
    while sizes[0] % (2 * smallest) == 0:
        sizes.insert(0, sizes[0] // 2)
    return sorted({smallest, *sizes})
