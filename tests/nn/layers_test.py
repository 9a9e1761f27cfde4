"""T5's layers compared with numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax.nn.layers import Dense, Dropout, Embed, MlpBlock, RMSNorm, project

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(2, 3, 8)).astype(np.float32)


def test_rms_norm_equals_numpy_and_subtracts_no_mean():
    scale = RANDOM.normal(size=8).astype(np.float32)
    out = RMSNorm(jnp.float32).apply({"params": {"scale": scale}}, X + 3.0)
    x = X.astype(np.float64) + 3.0
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(out, want, rtol=1e-5)


def test_rms_norm_of_zeros_is_zero():
    out = RMSNorm(jnp.float32).apply({"params": {"scale": np.ones(8, np.float32)}}, 0 * X)
    assert not np.asarray(out).any()


def test_rms_norm_squares_in_float32_for_bfloat16_streams():
    # In bfloat16, 256 + 1 is 256: the small channels would be lost.
    x = jnp.full((1, 512), 1.0, jnp.bfloat16)
    out = RMSNorm(jnp.bfloat16).apply({"params": {"scale": np.ones(512, np.float32)}}, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), 1.0)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("activations", [("gelu", "linear"), ("relu",)])
def test_feed_forward_equals_numpy(activations):
    names = ("wi",) if len(activations) == 1 else ("wi_0", "wi_1")
    kernels = {name: RANDOM.normal(size=(8, 12)).astype(np.float32) for name in names}
    kernels["wo"] = RANDOM.normal(size=(12, 8)).astype(np.float32)
    params = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    out = MlpBlock(12, activations, 0.0, jnp.float32).apply({"params": params}, X)
    functions = {"gelu": gelu_tanh, "relu": lambda x: np.maximum(x, 0), "linear": lambda x: x}
    hidden = 1.0
    for name, activation in zip(names, activations, strict=True):
        hidden = hidden * functions[activation](X.astype(np.float64) @ kernels[name])
    np.testing.assert_allclose(out, hidden @ kernels["wo"], rtol=1e-4, atol=1e-4)


def test_parameters_stay_float32_under_bfloat16_activations():
    dense = Dense(4, ("embed", "mlp"), jnp.bfloat16)
    boxed = jax.eval_shape(lambda: dense.init(jax.random.key(0), X))["params"]["kernel"]
    assert boxed.value.dtype == jnp.float32 and boxed.names == ("embed", "mlp")
    assert dense.apply({"params": {"kernel": np.ones((8, 4), np.float32)}}, X).dtype == jnp.bfloat16


def test_embedding_looks_up_rows_in_the_activation_dtype():
    table = RANDOM.normal(size=(5, 8)).astype(np.float32)
    tokens = np.array([[4, 0], [1, 4]])
    out = Embed(5, 8, jnp.bfloat16).apply({"params": {"embedding": table}}, tokens)
    np.testing.assert_array_equal(
        np.asarray(out, np.float32), np.asarray(table.astype(jnp.bfloat16), np.float32)[tokens]
    )


def test_reduced_operands_round_inputs_and_gradients_alike():
    kernel = RANDOM.normal(size=(8, 4)).astype(np.float32)
    cotangent = RANDOM.normal(size=(2, 3, 4)).astype(np.float32)

    def rounded(x):
        return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)

    out, vjp = jax.vjp(lambda x, w: project(x, w, ("embed", "mlp"), jnp.bfloat16), X, kernel)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, rounded(X) @ rounded(kernel), rtol=1e-5, atol=1e-5)
    grad_x, grad_kernel = vjp(cotangent)
    assert grad_x.dtype == grad_kernel.dtype == jnp.float32
    np.testing.assert_allclose(grad_x, rounded(cotangent) @ rounded(kernel).T, rtol=1e-5, atol=1e-5)
    want = np.einsum("bxi,bxo->io", rounded(X), rounded(cotangent))
    np.testing.assert_allclose(grad_kernel, want, rtol=1e-5, atol=1e-5)


def test_dropout_needs_a_stream_and_shares_its_mask_over_positions():
    x = np.ones((4, 50, 64), np.float32)
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x), x)
    out = np.asarray(Dropout(0.5).apply({}, x, rngs={"dropout": jax.random.key(0)}))
    assert set(np.unique(out)) == {0.0, 2.0}
    np.testing.assert_array_equal(out, np.broadcast_to(out[:, :1], out.shape))
    assert 0.3 < (out[:, 0] > 0).mean() < 0.7
    assert (out[0] != out[1]).any()


def test_dropout_rate_zero_needs_no_random_numbers():
    x = np.ones((2, 2, 4), np.float32)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, rngs={"dropout": jax.random.key(0)}), x)
