"""Self-attention by cuDNN's fused kernel, with T5's position bias: no logit reaches a GPU's memory."""

from typing import Literal

import jax
import jax.numpy as jnp

# Channels that carry the mask: one is needed, and cuDNN takes heads of a multiple of 8.
EXTRA = 8
# What the mask adds to a logit. With less than this cuDNN subtracts wrongly, says JAX's own mask.
MASKED = -(2.0**41)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_mask: jax.Array,
    bias: jax.Array,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """`nn.attention.attend` for a sequence that attends to itself, in bfloat16.

    The mask is a channel of its own: 1 in every query, 0 or `MASKED` in a key. Added to the bias it
    would make a bias for each sequence, as large as the logits that the kernel avoids.

    Args:
      query: bfloat16 `[..., N, H, C]`; C is a multiple of 8.
      key: bfloat16 `[..., N, H, C]`.
      value: bfloat16 `[..., N, H, C]`.
      key_mask: bool `[..., N]`; False keys are not seen.
      bias: float32 `[H, N, N]`, added to the logits; the kernel reads it in bfloat16.
      implementation: of `jax.nn.dot_product_attention`.

    Returns:
      bfloat16 `[..., N, H, C]`; zeros where no key is seen.

    Raises:
      ValueError: for cuDNN, in a process that computes on something else than a GPU, or on one that
        does not take it.
    """
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(
            "attention='cudnn' (ATTENTION) runs on NVIDIA GPUs, and this process computes on "
            f"{jax.default_backend()}. Set ATTENTION='plain'."
        )
    *_, length, _, channels = query.shape
    # With a bias the backward kernel takes even lengths alone: one more key that nobody sees.
    odd = length % 2
    masks = jnp.where(key_mask, 0.0, MASKED)
    masks = jnp.pad(masks, [(0, 0)] * (masks.ndim - 1) + [(0, odd)], constant_values=MASKED)

    def even_and_wide(x: jax.Array, channel: jax.Array | float) -> jax.Array:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, odd), (0, 0), (0, EXTRA)])
        x = x.at[..., channels].set(channel)
        return x.reshape(-1, *x.shape[-3:])

    try:
        out = jax.nn.dot_product_attention(
            even_and_wide(query, 1.0),
            even_and_wide(key, masks[..., None].astype(key.dtype)),
            even_and_wide(value, 0.0),
            bias=jnp.pad(bias, [(0, 0), (0, odd), (0, odd)]).astype(query.dtype)[None],
            scale=1.0,  # T5's logits are not scaled
            implementation=implementation,
        )
    except (NotImplementedError, RuntimeError) as error:
        # Such as heads of 128 channels, which the mask makes wider, on a GPU older than Hopper.
        raise ValueError(
            f"attention='cudnn' (ATTENTION) does not run here, with heads of {channels} channels and "
            f"{EXTRA} for the mask: {error} Set ATTENTION='plain'."
        ) from error
    out = out[:, :length, :, :channels].reshape(value.shape)
    return jnp.where(jnp.any(key_mask, axis=-1)[..., None, None, None], out, 0)
