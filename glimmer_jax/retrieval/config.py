"""Which retriever finds the passages of a question, and its settings."""

import dataclasses
import logging

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.retrieval.bm25 import Bm25Config, Bm25Retriever
from glimmer_jax.retrieval.dense import DenseConfig, DenseRetriever
from glimmer_jax.retrieval.hybrid import HybridRetriever, check_weight
from glimmer_jax.retrieval.retriever import Retriever

logger = logging.getLogger(__name__)

METHODS = ("bm25", "dense", "hybrid")


@dataclasses.dataclass(frozen=True)
class RetrieverConfig:
    """The retriever of questions that name no passages."""

    method: str = "bm25"  # bm25, dense or hybrid
    bm25: Bm25Config = dataclasses.field(default_factory=Bm25Config)
    dense: DenseConfig = dataclasses.field(default_factory=DenseConfig)
    dense_weight: float = 0.5  # of dense scores in hybrid, from 0 to 1

    def check(self) -> None:
        """Raises ValueError for an unknown method, missing settings, or a missing stemmer."""
        if self.method not in METHODS:
            raise ValueError(f"RETRIEVER must be one of {', '.join(METHODS)}, got {self.method!r}.")
        if self.method != "dense":
            self.bm25.check_stemmer()
        if self.method != "bm25":
            self.dense.check_given()
        # Also where the method does not use it: a wrong value must not wait for another method.
        check_weight(self.dense_weight)

    def _unused(self) -> list[str]:
        """Macros that were set and that the method does not read."""
        if self.method == "bm25":
            given = {"ENCODER_DIR": self.dense.encoder_dir, "INDEX_DIR": self.dense.index_dir}
            return [name for name, value in given.items() if value]
        changed = self.dense_weight != RetrieverConfig.dense_weight
        return ["DENSE_WEIGHT"] if self.method == "dense" and changed else []

    def open(self, passages: Passages) -> Retriever:
        """The retriever over a corpus; builds or resumes an unfinished dense index.

        Raises:
          ValueError: settings that `check` rejects, or an encoder or index that does not fit.
          StopRequested: a stop was requested; finished parts of the index are kept.
        """
        self.check()
        if unused := self._unused():
            logger.warning("RETRIEVER=%r does not use %s.", self.method, " and ".join(unused))
        if self.method == "bm25":
            return Bm25Retriever(passages, self.bm25)
        dense = DenseRetriever.open(passages, self.dense)
        if self.method == "dense":
            return dense
        return HybridRetriever(Bm25Retriever(passages, self.bm25), dense, self.dense_weight)
