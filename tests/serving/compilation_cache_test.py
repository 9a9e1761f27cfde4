"""JAX's persistent compilation cache: what one process has compiled, the next one fetches."""

import os
import subprocess
import sys

import pytest

from glimmer_jax import shipped
from glimmer_jax.weights.model_config import describe
from glimmer_jax.weights.params_file import save_params_file
from tests.models import tiny
from tests.serving.predictor_test import GLIMMER, VOCABULARY, corpus  # noqa: F401 (fixture)

# A process that serves; it says how many programs it has fetched and how many it has compiled.
SERVE = """
import collections
import sys

import jax

from glimmer_jax.axes import Lengths
from glimmer_jax.serving.predictor import Predictor

seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event]))
lengths = Lengths(question=8, target=4, passages=2, passage=8)
predictor = Predictor.load(sys.argv[1], lengths, passages_dir=sys.argv[2], batch_sizes=(1,))
predictor.warm_up()
print(*(seen[f"/jax/compilation_cache/cache_{what}"] for what in ("hits", "misses")))
"""


@pytest.mark.timeout(300)
def test_a_second_process_fetches_what_the_first_has_compiled(corpus, tmp_path):  # noqa: F811
    checkpoint, cache = tmp_path / "glimmer.safetensors", tmp_path / "cache"
    described = describe(GLIMMER, VOCABULARY.fingerprint)
    save_params_file(checkpoint, tiny.params(GLIMMER), described)
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }

    def serve():
        """(programs fetched, programs compiled, entries of the cache afterwards)."""
        run = subprocess.run(
            [sys.executable, "-c", SERVE, checkpoint, corpus],
            cwd=shipped.root(),
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=140,
        )
        assert run.returncode == 0, run.stderr
        fetched, compiled = map(int, run.stdout.splitlines()[-1].split())
        return fetched, compiled, {path.name for path in cache.glob("*-cache")}

    fetched, compiled, entries = serve()
    assert compiled > 0 and entries
    assert serve() == (fetched + compiled, 0, entries)
