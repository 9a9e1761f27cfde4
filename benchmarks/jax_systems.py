"""Our FiD, LUMEN and GLIMMER, laid out as in `serving`."""

import tempfile
from typing import Any

import jax
import numpy as np

from benchmarks.jax_worker import JaxWorker
from benchmarks.memory import build_lookup
from benchmarks.setting import Setting, glimmer_config
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.partitioning import MeshConfig, make_mesh
from glimmer_jax.preflight.flops import count_flops
from glimmer_jax.serving import param_layout
from glimmer_jax.serving.step import Predict

NO_END = -1  # not a token: answers have full length


class JaxSystem(JaxWorker):
    """Answers one question at a time; the order of passages varies."""

    def __init__(self, system: str, dtype: str, setting: Setting):
        super().__init__(setting, dtype)
        on_cpu = jax.default_backend() == "cpu"
        config = glimmer_config(system, setting, dtype, on_cpu)
        model = GlimmerModel(config, eos_id=NO_END)
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        params = _random_params(model)
        size = (setting.passages[-1], setting.passage)
        self._tokens_NP = self._random.integers(2, config.t5.vocab_size, size).astype(np.int32)
        self._vocab_size = config.t5.vocab_size
        lookup = None
        self._folder = tempfile.TemporaryDirectory(prefix="memory-")
        if config.memory_layers:
            path = f"{self._folder.name}/store"
            lookup = build_lookup(model, params, mesh, self._tokens_NP, setting, path)
        params, platform = param_layout.unstack(model, params), jax.default_backend()
        model = param_layout.unrolled(model, platform)
        params = param_layout.lay_out(model, params, 1, platform)
        self._model, self._params, self._lookup = model, params, lookup
        self._predict = Predict(model, mesh, lookup)
        decoder = jax.tree.leaves(params["decoder"])
        self.decoder_bytes = sum(leaf.nbytes for leaf in decoder)

    def close(self) -> None:
        """Removes the store."""
        self._folder.cleanup()

    def batch(self, passages: int) -> dict[str, np.ndarray]:
        """A new question with its passages."""
        rows = self._random.permutation(len(self._tokens_NP))[:passages]
        question = self._random.integers(2, self._vocab_size, (1, self.setting.question))
        batch = {
            "question_tokens": question.astype(np.int32),
            "decoder_input_tokens": np.zeros((1, self.setting.answer), np.int32),
        }
        if self._lookup is not None:
            return {**batch, "passage_ids": rows[None].astype(np.int64)}
        return {**batch, "passage_tokens": self._tokens_NP[rows][None]}

    def prepare(self, passages: int) -> None:
        """Compiles and runs once."""
        self.answer(passages)

    def answer(self, passages: int) -> np.ndarray:
        """int32 `[T]`."""
        return self._predict(self._params, self.batch(passages))[0][0]

    def flops(self, passages: int) -> int:
        """FLOPs of one answer, counted in the jaxpr."""
        batch = self.batch(passages)
        if self._lookup is not None:
            batch = self._lookup.add(batch)
            batch.pop("passage_ids")
        traced = jax.make_jaxpr(self._model.predict_batch)(self._params, batch)
        return count_flops(traced, while_trips=self.setting.answer)


def _random_params(model: GlimmerModel) -> Any:
    return jax.jit(model.init_params)(jax.random.key(0))
