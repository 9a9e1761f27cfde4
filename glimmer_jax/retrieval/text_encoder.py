"""Texts to vectors: GTR's own tokens, batches of similar length, rows distributed over all devices.

GTR reads plain texts, without the prefixes that the readers put before title and context. It therefore
has its own tokens and does not use those of a passages folder.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import sentencepiece
from jax.sharding import Mesh

from glimmer_jax import partitioning
from glimmer_jax.memory import encoding
from glimmer_jax.memory.manifest import EncodeProgram
from glimmer_jax.models.gtr import Gtr
from glimmer_jax.models.stacking import stack_layers
from glimmer_jax.vocabulary import EOS_ID, EXTRA_IDS, PAD_ID
from glimmer_jax.weights.find_vocabulary import EMBEDDING_MULTIPLE
from glimmer_jax.weights.sentence_transformers import LoadedGtr, load_gtr


def dense_text(record: Mapping[str, Any]) -> str:
    """Title and text separated by a space, as in public retrieval benchmarks of GTR."""
    return f"{record['title']} {record['text']}".strip()


class TextEncoder:
    """A GTR on the devices of this process.

    Attributes:
      loaded: weights, vocabulary and settings.
      program: of one device.
      devices: over which rows are distributed.
      run: int32 tokens `[devices * rows, P]` -> float32 vectors `[devices * rows, E]`.
    """

    def __init__(self, loaded: LoadedGtr, mesh: Mesh, rows: int, dtype: str = "float32"):
        """Places the weights on the devices.

        Args:
          loaded: weights, vocabulary and settings.
          mesh: devices of this process.
          rows: texts in the batch of one device.
          dtype: of activations, float32 or bfloat16.

        Raises:
          ValueError: the vocabulary does not fit the embedding, or a setting is out of range.
        """
        self.loaded = loaded
        self.devices = mesh.size
        t5 = dataclasses.replace(loaded.t5, scan_layers=True, dtype=dtype)
        buckets = encoding.default_buckets(loaded.max_length)
        self.program = EncodeProgram(
            rows, buckets, dtype, None, jax.default_backend(), jax.__version__
        )
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(loaded.vocabulary)
        except RuntimeError as error:
            raise ValueError(
                f"ENCODER_DIR: its spiece.model is not a SentencePiece model ({error}). Copy the file "
                "again; a Git LFS pointer is not the file itself."
            ) from None
        _check_vocabulary(self._processor, t5.vocab_size)
        model = Gtr(t5, loaded.vector_dim)
        params = jax.device_put(stack_layers(loaded.params), partitioning.replicated(mesh))
        self.run = encoding.bind_states(lambda p, x: model.apply({"params": p}, x), params, mesh)

    @classmethod
    def open(cls, path: str, mesh: Mesh, rows: int, dtype: str = "float32") -> "TextEncoder":
        """The encoder of a folder of sentence-transformers. Raises ValueError (`load_gtr`)."""
        return cls(load_gtr(path), mesh, rows, dtype)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, not truncated and without end token."""
        tokens: list[list[int]] = self._processor.EncodeAsIds([text.strip() for text in texts])
        return tokens

    def encode(
        self,
        tokens: Sequence[Sequence[int]],
        after_batch: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """float32 `[n, E]`, a vector of length 1 for each text.

        A vector depends only on the texts of the same call, not on the number of devices.

        Args:
          tokens: from `tokenize`; longer texts are truncated, and each gets an end token.
          after_batch: called after each batch of all devices; it may raise to stop.
        """
        most, rows = self.loaded.max_length - 1, self.program.rows
        lengths = np.array([min(len(ids), most) + 1 for ids in tokens], np.int64)
        vectors = np.zeros((len(tokens), self.loaded.vector_dim), np.float32)
        running: deque[tuple[list[encoding.Group], Any]] = deque()

        def place() -> None:
            call, encoded = running.popleft()
            host = np.asarray(encoded)
            for device, group in enumerate(call):
                count = len(group.positions)
                vectors[group.positions] = host[device * rows : device * rows + count]
            after_batch()

        groups = encoding.groups(lengths, rows, self.program.buckets)
        for call in encoding.calls(groups, self.devices):
            batch = np.zeros((self.devices, rows, call[0].bucket), np.int32)
            for device, group in enumerate(call):
                for slot, position in enumerate(group.positions):
                    batch[device, slot, : lengths[position]] = [*tokens[position][:most], EOS_ID]
            running.append((call, self.run(batch.reshape(-1, call[0].bucket))))
            # One batch ahead: the devices work on it while the previous one is stored.
            if len(running) > 1:
                place()
        while running:
            place()
        return vectors


def _check_vocabulary(processor: Any, rows: int) -> None:
    """Raises ValueError for a vocabulary that cannot be that of an embedding with `rows` rows."""
    pieces, pad = int(processor.GetPieceSize()), processor.pad_id()
    eos, unk = processor.eos_id(), processor.unk_id()
    filled = -(-(pieces + EXTRA_IDS) // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE
    if not pieces <= rows <= filled or pad != PAD_ID or eos != EOS_ID or unk <= EOS_ID:
        raise ValueError(
            f"ENCODER_DIR: its spiece.model has {pieces} pieces, pad_id={pad}, eos_id={eos} and "
            f"unk_id={unk}. T5's are {PAD_ID}, {EOS_ID} and above; the embedding has {rows} rows. "
            "Use the spiece.model that the encoder was trained with."
        )
