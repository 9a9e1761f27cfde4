"""Dense retrieval: exact search with GTR's vector of a question over the vectors of all passages."""

import dataclasses
import logging
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.memory import versions
from glimmer_jax.memory.build_plan import Builders
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.retrieval import top_k
from glimmer_jax.retrieval.build_index import SHARD_PASSAGES, build_index
from glimmer_jax.retrieval.index import Index
from glimmer_jax.retrieval.retriever import Results, Retriever
from glimmer_jax.retrieval.text_encoder import TextEncoder
from glimmer_jax.runtime.preemption import STOP, StopRequested
from glimmer_jax.storage import folder

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """Encoder and index of dense retrieval."""

    encoder_dir: str | None = None  # a GTR as sentence-transformers publishes it
    index_dir: str | None = None  # folder or TensorStore URL; built or resumed if not finished
    batch_size: int = 32  # texts in the batch of one device
    dtype: str = "float32"  # of activations, float32 or bfloat16; the vector is float32
    bytes_per_device: int = 8 * 2**30  # an index that fits stays on the devices
    shard_passages: int = SHARD_PASSAGES

    def check_given(self) -> None:
        """Raises ValueError naming settings that dense retrieval lacks."""
        given = {"ENCODER_DIR": self.encoder_dir, "INDEX_DIR": self.index_dir}
        missing = [name for name, value in given.items() if not value]
        if missing:
            raise ValueError(
                f"Dense retrieval needs {' and '.join(missing)}. Set ENCODER_DIR to the folder of a "
                "GTR and INDEX_DIR to a folder for its vectors, or RETRIEVER = 'bm25'."
            )


class DenseRetriever(Retriever):
    """Searches an index with the vectors of questions."""

    def __init__(
        self,
        passages: Passages,
        encoder: TextEncoder,
        search: top_k.Search,
        allowed: np.ndarray | None = None,
    ):
        super().__init__(passages)
        self._encoder = encoder
        self._search = search
        self._allowed = allowed
        # From disk, a pass over the index costs the same for one question as for many.
        self.questions_at_a_time = 4096 if search.on_mesh else top_k.PASS_QUESTIONS

    @classmethod
    def open(cls, passages: Passages, config: DenseConfig) -> "DenseRetriever":
        """Opens encoder, index and search; builds or resumes the index if it is not finished.

        Raises:
          ValueError: the encoder's folder holds no GTR, or the index does not fit (`build_index`).
          StopRequested: asked to stop; what is finished of the index is kept.
        """
        config.check_given()
        own = make_mesh(MeshConfig(), jax.local_devices())
        encoder = TextEncoder.open(str(config.encoder_dir), own, config.batch_size, config.dtype)
        _logger.info("Encoder: %s.", encoder.loaded.what)
        index = _finished_index(passages, encoder, str(config.index_dir), config.shard_passages)
        search = top_k.Search(index, make_mesh(MeshConfig()), config.bytes_per_device)
        stored = index.store.manifest
        _logger.info(
            "%s: %d vectors of %d channels, %.1f MiB, %d passages truncated to %d tokens; searched %s.",
            config.index_dir, stored.num_passages, index.vector_dim, stored.num_bytes / 2**20,
            stored.truncated, stored.identity.max_length,
            "on the devices" if search.on_mesh else "from disk, in blocks",
        )  # fmt: skip
        return cls(passages, encoder, search)

    def among(self, rows: np.ndarray) -> "DenseRetriever":
        allowed = np.zeros(len(self.passages), bool)
        allowed[rows] = True
        return DenseRetriever(self.passages, self._encoder, self._search, allowed)

    def search(self, questions: Sequence[str], k: int) -> Results:
        tokens = self._encoder.tokenize(questions)
        vectors = self._encoder.encode(tokens, STOP.poll_together)
        scores, rows = self._search(vectors, k, self._allowed)
        return [
            [(int(row), float(score)) for row, score in zip(*ranked, strict=True) if row >= 0]
            for ranked in zip(rows, scores, strict=True)
        ]


def _finished_index(
    passages: Passages, encoder: TextEncoder, index_dir: str, shard_passages: int
) -> Index:
    """The index, built by all processes of the job; if one is asked to stop, all of them stop."""
    index = None
    try:
        index = build_index(
            index_dir,
            passages,
            encoder,
            shard_passages=shard_passages,
            builders=Builders(jax.process_index(), jax.process_count()),
        )
    except StopRequested:
        # If the index is finished, the other processes do not know of the stop and wait below.
        alone = jax.process_count() == 1
        if alone or not versions.is_finished(folder.open_folder(index_dir)):
            raise
    stopped = index is None or STOP.requested
    if multihost_utils.process_allgather(np.bool_(stopped)).any():
        raise StopRequested("Stopped when the index was finished. Rerun the same command.")
    assert index is not None
    return index
