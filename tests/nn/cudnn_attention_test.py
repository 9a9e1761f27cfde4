"""cuDNN's attention compared with the plain path, without a GPU."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glimmer_jax.nn import attention, cudnn_attention
from glimmer_jax.nn.attention import Attention, attend
from tests.models import tiny

B, K, H, C = 2, 3, 4, 16
# Tolerances for bfloat16 rounding of logits up to 20 and of weights.
CLOSE = dict(atol=0.06, rtol=0.03)


def arrays(length, seed=0):
    """Queries, keys, values, a key mask with gaps and one empty sequence, a bias."""
    random = np.random.default_rng(seed)
    states = (random.normal(size=(B, K, length, H, C)) for _ in range(3))
    mask = random.random((B, K, length)) < 0.6
    mask[0, 0] = False
    mask[1, :, 0] = True
    # Rounded here, so that both read the same bias.
    bias = jnp.asarray(random.normal(size=(H, length, length)), jnp.bfloat16)
    return *(jnp.asarray(x, jnp.bfloat16) for x in states), mask, bias.astype(jnp.float32)


# The same arguments, given to XLA in place of cuDNN.
fused = functools.partial(cudnn_attention.attend, implementation="xla")


def plain(query, key, value, mask, bias):
    return attend(query, key, value, mask[..., None, None, :], bias)


@pytest.mark.parametrize("length", [6, 7])
def test_output_and_gradients_equal_those_of_plain_attention(length):
    query, key, value, mask, bias = arrays(length)
    weights = np.random.default_rng(1).normal(size=query.shape).astype(np.float32)

    def run(function):
        def total(query, key, value, bias):
            out = function(query, key, value, mask, bias)
            return jnp.sum(out.astype(jnp.float32) * weights), out

        return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True))(
            query, key, value, bias
        )

    (_, out), grads = run(fused)
    (_, expected), expected_grads = run(plain)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (out, expected)), **CLOSE)
    assert not np.asarray(out[0, 0], np.float32).any()
    for grad, want in zip(grads, expected_grads, strict=True):
        assert grad.dtype == want.dtype
        grad, want = (np.asarray(x, np.float32) for x in (grad, want))
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(grad, want, **CLOSE)
    assert not np.asarray(grads[0][0, 0], np.float32).any()


def test_masked_keys_have_no_influence():
    query, key, value, mask, bias = arrays(6)
    mask[..., -1] = False
    before = fused(query, key, value, mask, bias)
    key, value = key.at[..., -1, :, :].set(1e3), value.at[..., -1, :, :].set(-1e3)
    np.testing.assert_array_equal(fused(query, key, value, mask, bias), before)


def test_dropout_equals_that_of_the_plain_path(monkeypatch):
    *_, mask, bias = arrays(6)
    x = jax.random.normal(jax.random.key(0), (B, K, 6, 8), jnp.bfloat16)
    settings = dict(emb_dim=8, num_heads=H, num_kv_heads=H, head_dim=C, dropout_rate=0.5)
    monkeypatch.setitem(attention.FUSED, "cudnn", fused)

    class Self(nn.Module):
        kernel: str

        def setup(self):
            self.attention = Attention(**settings, dtype=jnp.bfloat16, kernel=self.kernel)

        def __call__(self, x):
            keys_values = self.attention.keys_values(x)
            return self.attention(x, keys_values, mask[..., None, None, :], bias)

    variables = nn.unbox(Self("plain").init(jax.random.key(1), x))
    outs = [
        np.asarray(Self(kernel).apply(variables, x, rngs=rngs), np.float32)
        for kernel in ("cudnn", "plain")
        for rngs in ({"dropout": jax.random.key(2)}, None)
    ]
    np.testing.assert_allclose(outs[0], outs[2], **CLOSE)
    np.testing.assert_allclose(outs[1], outs[3], **CLOSE)
    assert np.abs(outs[0] - outs[1]).max() > 0.2


def test_a_complete_model_gives_the_same_loss_and_gradients(monkeypatch):
    monkeypatch.setitem(attention.FUSED, "cudnn", fused)
    t5 = dataclasses.replace(tiny.T5, head_dim=8, dtype="bfloat16")
    losses, norms = [], []
    for kernel in ("cudnn", "plain"):
        config = dataclasses.replace(tiny.GLIMMER, t5=dataclasses.replace(t5, attention=kernel))
        (loss, _), grads = tiny.loss_and_grad(config)(tiny.params(config), tiny.batch())
        losses.append(float(loss))
        norms.append(
            {
                jax.tree_util.keystr(path): float(jnp.linalg.norm(leaf))
                for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
            }
        )
    np.testing.assert_allclose(*losses, rtol=0.02)
    for name, norm in norms[0].items():
        np.testing.assert_allclose(norm, norms[1][name], rtol=0.2, err_msg=name)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Allows lowering programs for CUDA without a GPU, although JAX queries the GPU's cuDNN."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91002)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize("length", [64, 63])
def test_cudnn_takes_one_bias_for_all_sequences_and_its_gradient(as_on_a_gpu, length):
    query, key, value, mask, bias = arrays(length)

    def total(query, key, value, bias):
        out = cudnn_attention.attend(query, key, value, mask, bias)
        return jnp.sum(out.astype(jnp.float32))

    step = jax.jit(jax.grad(total, (0, 1, 2, 3)))
    text = step.trace(query, key, value, bias).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@__cudnn\$(\w+)\(.*\) -> \((.*)\)", text)
    assert [name for name, _ in calls] == ["fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"]
    states = f"tensor<{B * K}x{H}x64x{C + cudnn_attention.EXTRA}xbf16>"
    assert calls[1][1].startswith(f"{states}, {states}, {states}, tensor<1x{H}x64x64xbf16>")


def test_other_devices_are_rejected():
    with pytest.raises(ValueError, match="ATTENTION.*cpu.*ATTENTION='plain'"):
        cudnn_attention.attend(*arrays(6))
