"""A toy with the model class's training interface: embedding, plain MLP layers, output.

Layers are scanned (`layers` with a leading axis) or looped (`layers_0`, ...), and the loss is a
mean over real tokens plus a mean over examples, so that accumulation has two denominators.
"""

import jax
import jax.numpy as jnp
import numpy as np

from glimmer_jax.training.loop import Run

V, D, F, L = 32, 16, 24, 3


class ToyModel:
    def __init__(self, scan_layers=True, dropout_rate=0.0):
        self.scan_layers = scan_layers
        self.dropout_rate = dropout_rate

    def init(self):
        # Numbers from numpy: constants compile at once, random draws take a second.
        def normal(seed, *shape):
            return jnp.asarray(0.3 * np.random.default_rng(seed).normal(size=shape), jnp.float32)

        # Layers of very different size: their updates are clipped and scaled differently.
        sizes = jnp.array([1e-4, 1.0, 7.0])[:, None, None]
        layers = {
            "wi": {"kernel": sizes * normal(0, L, D, F)},
            "wo": {"kernel": normal(1, L, F, D)},
            "norm": {"scale": 1.0 + normal(2, L, D)},
        }
        if self.scan_layers:
            stack = {"layers": layers}
        else:
            stack = {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(L)}
        return {
            "embedder": {"embedding": normal(3, V, D)},
            "stack": stack,
            "output": {"kernel": normal(4, D, V)},
        }

    def param_names(self):
        lead = ("layers",) if self.scan_layers else ()
        layer = {
            "wi": {"kernel": (*lead, "embed", "mlp")},
            "wo": {"kernel": (*lead, "mlp", "embed")},
            "norm": {"scale": (*lead, "embed")},
        }
        stack = {"layers": layer} if lead else {f"layers_{i}": layer for i in range(L)}
        return {
            "embedder": {"embedding": ("vocab", "embed")},
            "stack": stack,
            "output": {"kernel": ("embed", "vocab")},
        }

    def loss_normalizers(self, batch):
        return {
            "tokens": jnp.sum(batch["decoder_loss_weights"]),
            "examples": jnp.asarray(batch["decoder_loss_weights"].shape[0], jnp.float32),
        }

    def loss_fn(self, params, batch, dropout_rng, normalizers=None):
        normalizers = self.loss_normalizers(batch) if normalizers is None else normalizers
        x = params["embedder"]["embedding"][batch["tokens"]]
        if self.dropout_rate:
            keep = jax.random.bernoulli(dropout_rng, 1 - self.dropout_rate, x.shape)
            x = x * keep / (1 - self.dropout_rate)

        def layer(x, p):
            y = x * p["norm"]["scale"][None, None]
            return x + jnp.tanh(y @ p["wi"]["kernel"]) @ p["wo"]["kernel"], None

        if self.scan_layers:
            x, _ = jax.lax.scan(layer, x, params["stack"]["layers"])
        else:
            for i in range(L):
                x, _ = layer(x, params["stack"][f"layers_{i}"])
        log_p = jax.nn.log_softmax(x @ params["output"]["kernel"])
        log_p = jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
        weights = batch["decoder_loss_weights"]
        total = -jnp.sum(log_p * weights)
        pooled = jnp.sum(jnp.square(jnp.mean(x, (1, 2))))
        loss = total / normalizers["tokens"] + 1e-2 * pooled / normalizers["examples"]
        return loss, {"token_loss": (total, jnp.sum(weights))}


def batch_at(step, rows=16, length=5):
    """The batch of a step, always the same; targets are a function of tokens, so it can learn."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(1, V, (rows, length)).astype(np.int32)
    lengths = rng.integers(1, length + 1, rows)
    weights = (np.arange(length) < lengths[:, None]).astype(np.float32)
    return {
        "tokens": tokens,
        "targets": (tokens * 7 + 3) % V,
        "decoder_loss_weights": weights,
        "passage_ids": np.full((rows, 2), 2**40, np.int64),
    }


def batches_from(step, **kwargs):
    while True:
        yield batch_at(step, **kwargs)
        step += 1


def train(
    config,
    model,
    optimizer,
    mesh,
    model_dir,
    make_batches,
    fresh_params,
    *,
    check_restored=None,
    evaluate=None,
    metadata=None,
):
    """Restores and trains a run; `make_batches(step)` iterates from a step on."""
    with Run(config, model, optimizer, mesh, model_dir, metadata) as run:
        state = run.restore(fresh_params)
        if check_restored is not None:
            check_restored(state)
        return run.train(state, make_batches(int(state.step)), evaluate)
