"""Building a dense index: GTR's vectors of a passages folder, by the build of the memory store."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from glimmer_jax.corpus.passages import Passages
from glimmer_jax.memory import versions
from glimmer_jax.memory.build import BuildConfig, build_memory
from glimmer_jax.memory.build_plan import Builders
from glimmer_jax.memory.encoding import MemoryEncoder, encode_states
from glimmer_jax.memory.maintain import incomplete_files
from glimmer_jax.memory.manifest import DamagedStore, Identity, Layout
from glimmer_jax.retrieval.index import CODEC, Index, texts_fingerprint
from glimmer_jax.retrieval.text_encoder import TextEncoder, dense_text
from glimmer_jax.storage import folder
from glimmer_jax.vocabulary import EOS_ID

logger = logging.getLogger(__name__)

SHARD_PASSAGES = 32768  # 48 MiB of vectors of 768
CHUNK_VECTORS = 1024


class TextPassages:
    """The texts of a passages folder as GTR's tokens, as the build of a memory store reads them."""

    def __init__(self, passages: Passages, encoder: TextEncoder):
        self.ids = passages.ids
        self._passages = passages
        self._encoder = encoder
        # Of the rows of the last call: a build asks for lengths, then for tokens.
        self._rows = np.zeros(0, np.int64)
        self._tokens: list[list[int]] = []

    def __len__(self) -> int:
        return len(self._passages)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """int64, tokens of each text with its end token, also of texts that will be truncated."""
        return np.array([len(tokens) + 1 for tokens in self._tokenized(rows)], np.int64)

    def tokens(self, rows: np.ndarray, length: int) -> np.ndarray:
        """int32 `[n, length]`: tokens and end token, which truncated texts get too."""
        tokens = np.zeros((len(rows), length), np.int32)
        for row, ids in zip(tokens, self._tokenized(rows), strict=True):
            ids = [*ids[: length - 1], EOS_ID]
            row[: len(ids)] = ids
        return tokens

    def records(self, start: int, stop: int) -> Iterable[Mapping[str, Any]]:
        """The records of the folder."""
        return self._passages.records(start, stop)

    def _tokenized(self, rows: np.ndarray) -> list[list[int]]:
        if not np.array_equal(rows, self._rows):
            records = self._passages.records(int(rows[0]), int(rows[-1]) + 1)
            texts = [dense_text(record) for record in records]
            self._rows, self._tokens = rows, self._encoder.tokenize(texts)
        return self._tokens


def index_encoder(encoder: TextEncoder) -> MemoryEncoder:
    """Token ids to one stored vector per passage."""
    loaded = encoder.loaded

    @jax.jit
    def store(vectors: jax.Array):
        return encode_states(CODEC, vectors[:, None])

    return MemoryEncoder(
        lambda tokens: store(encoder.run(tokens)),
        Identity(
            encoder_fingerprint=loaded.fingerprint,
            vocabulary_fingerprint=loaded.vocabulary_fingerprint,
            codec=CODEC,
            emb_dim=loaded.vector_dim,
            max_length=loaded.max_length,
        ),
        encoder.program,
        encoder.devices,
        pooled=True,
    )


def build_index(
    path: folder.Path,
    passages: Passages,
    encoder: TextEncoder,
    *,
    shard_passages: int = SHARD_PASSAGES,
    builders: Builders = Builders(),
) -> Index:
    """The index at `path`: opened if it is finished, otherwise built or resumed.

    Args:
      path: a local folder, a TensorStore URL or spec; created if missing.
      passages: the corpus; row i becomes row i of the index.
      encoder: of the vectors.
      shard_passages: passages per shard of a new index.
      builders: index and number of the processes that build this index.

    Raises:
      ValueError: the index at `path` was built by another encoder, from other passages or in other
        shards, another writer is at work, or the encoder returned NaN or infinity.
      OSError: the storage failed; finished shards are kept.
      StopRequested: a stop was requested; finished shards are kept.
    """
    memory_encoder = index_encoder(encoder)
    fingerprint = texts_fingerprint(passages.manifest)
    identity = memory_encoder.identity, fingerprint
    layout = Layout(shard_passages, CHUNK_VECTORS)
    kvstore = folder.open_folder(path)
    if versions.is_finished(kvstore):
        try:
            layout = next(iter(versions.read_manifest(kvstore).layouts), layout)
            # The build would tokenize the corpus again to compare it with the shards.
            if (index := _complete_index(path, *identity)) is not None:
                return index
        except DamagedStore as damage:
            logger.warning("rebuilding what is damaged: %s", damage)
    report = build_memory(
        memory_encoder,
        TextPassages(passages, encoder),
        path,
        passages_fingerprint=fingerprint,
        config=BuildConfig(layout, builders=builders),
        name="index",
    )
    if report.manifest is None:
        builders.wait_for_first(kvstore.url, lambda: _is_complete(path, *identity))
    return Index.open(path, *identity)


def _complete_index(path: Any, encoder: Identity, passages: str) -> Index | None:
    """The index, if no file of it is missing or cut. Raises DamagedStore."""
    index = Index.open(path, encoder, passages)
    return None if incomplete_files(index.store) else index


def _is_complete(path: Any, encoder: Identity, passages: str) -> bool:
    """Whether the index is finished; one that is being repaired has its manifest already."""
    if not versions.is_finished(folder.open_folder(path)):
        return False
    try:
        return _complete_index(path, encoder, passages) is not None
    except DamagedStore:
        return False
