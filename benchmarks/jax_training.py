"""Training steps of our FiD, LUMEN and GLIMMER, from tokens or from stored memory."""

import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks.jax_worker import JaxWorker
from benchmarks.memory import build_lookup
from benchmarks.setting import LEARNING_RATE, Setting, glimmer_config
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.partitioning import MeshConfig, make_mesh, put_batch
from glimmer_jax.preflight.flops import count_flops
from glimmer_jax.training.optimizer import OptimizerConfig, make_optimizer
from glimmer_jax.training.state import init_state, state_shardings
from glimmer_jax.training.step import jit_train_step, make_train_step


class JaxTraining(JaxWorker):
    """Trains on one question at a time, with Adafactor and the default losses."""

    decoder_bytes = 0  # A step reads weights once, whatever the length of the answer.

    def __init__(self, system: str, dtype: str, setting: Setting):
        super().__init__(setting, dtype)
        config = glimmer_config(system, setting, dtype, jax.default_backend() == "cpu")
        self._vocab_size = config.t5.vocab_size
        model = GlimmerModel(config)
        self._mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        shapes, names = model.abstract_variables()
        optimizer = make_optimizer(
            OptimizerConfig(learning_rate=LEARNING_RATE), names, model.frozen(shapes)
        )
        self._state = init_state(
            lambda: model.init_params(jax.random.key(0)), optimizer, self._mesh
        )
        size = (setting.passages[-1], setting.passage)
        self._tokens_NP = self._random_tokens(*size)
        self._folder = tempfile.TemporaryDirectory(prefix="memory-")
        self._lookup = None
        if system == "glimmer_memory":
            path = f"{self._folder.name}/store"
            self._lookup = build_lookup(
                model, self._state.params, self._mesh, self._tokens_NP, setting, path
            )
        self._step = make_train_step(model, optimizer)
        shardings = state_shardings(optimizer, shapes, self._mesh)
        self._compiled = jit_train_step(self._step, shardings, self._mesh)

    def close(self) -> None:
        """Removes the store."""
        self._folder.cleanup()

    def batch(self, passages: int) -> dict[str, Any]:
        """A new question with an answer and passages, in a new order."""
        rows = self._random.permutation(len(self._tokens_NP))[:passages]
        answer = self._random_tokens(1, self.setting.answer)
        batch: dict[str, Any] = {
            "question_tokens": self._random_tokens(1, self.setting.question),
            "decoder_input_tokens": np.pad(answer[:, :-1], ((0, 0), (1, 0))),
            "decoder_target_tokens": answer,
            "decoder_loss_weights": np.ones(answer.shape, np.float32),
        }
        if self._lookup is None:
            return {**batch, "passage_tokens": self._tokens_NP[rows][None]}
        batch = self._lookup.add({**batch, "passage_ids": rows[None].astype(np.int64)})
        batch.pop("passage_ids")
        return batch

    def _random_tokens(self, *shape: int) -> np.ndarray:
        return self._random.integers(2, self._vocab_size, shape).astype(np.int32)

    def prepare(self, passages: int) -> None:
        """Compiles and runs once."""
        self.answer(passages)

    def answer(self, passages: int) -> np.ndarray:
        """One update; returns the loss."""
        with jax.set_mesh(self._mesh):
            batch = put_batch(self.batch(passages), self._mesh)
            self._state, metrics = self._compiled(self._state, batch)
            jax.block_until_ready(self._state)
        return np.asarray(metrics["loss"])

    def flops(self, passages: int) -> int:
        """FLOPs of one step, counted in the jaxpr."""
        with jax.set_mesh(self._mesh):
            return count_flops(jax.make_jaxpr(self._step)(self._state, self.batch(passages)))
