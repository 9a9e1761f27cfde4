"""Self-attention with cuDNN's fused kernel and T5's position bias: logits stay out of GPU memory."""

from typing import Literal

import jax
import jax.numpy as jnp

# Channels for the mask: one is needed, and cuDNN requires a multiple of 8 per head.
EXTRA = 8
# Added to masked logits. According to JAX's own masks, cuDNN's arithmetic fails for lower values.
MASKED = -(2.0**41)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_mask: jax.Array,
    bias: jax.Array,
    keep: jax.Array | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """`nn.attention.attend` of a sequence to itself, in bfloat16.

    The mask is an additional channel: 1 in every query, 0 or `MASKED` in a key. As part of the bias it
    would need one bias per sequence, as large as the logits that the kernel avoids.

    Args:
      query: bfloat16 `[..., N, H, C]`; C is a multiple of 8.
      key: bfloat16 `[..., N, H, C]`.
      value: bfloat16 `[..., N, H, C]`.
      key_mask: bool `[..., N]`; False keys are ignored.
      bias: float32 `[H, N, N]`, added to the logits; the kernel reads it in bfloat16.
      keep: dropout factors of the weights, `[..., H, N]`, the same for all queries.
      implementation: of `jax.nn.dot_product_attention`.

    Returns:
      bfloat16 `[..., N, H, C]`; zeros for a sequence without keys.

    Raises:
      ValueError: the process does not run on a GPU, or cuDNN does not support it.
    """
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(
            "attention='cudnn' (ATTENTION) needs an NVIDIA GPU, and this process runs on "
            f"{jax.default_backend()}. Set ATTENTION='plain'."
        )
    if keep is not None:
        # All queries share a factor, so that it can scale the value instead of the weight.
        value = (value * jnp.swapaxes(keep, -1, -2)[..., None]).astype(value.dtype)
    *_, length, _, channels = query.shape
    # The backward kernel with a bias requires an even length: add one masked key.
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
            scale=1.0,  # T5 does not scale logits
            implementation=implementation,
        )
    except (NotImplementedError, RuntimeError) as error:
        # For example heads of 128 channels, wider with the mask, on a GPU older than Hopper.
        raise ValueError(
            f"attention='cudnn' (ATTENTION) does not support heads of {channels} channels, and "
            f"{EXTRA} for the mask, on this GPU: {error} Set ATTENTION='plain'."
        ) from error
    out = out[:, :length, :, :channels].reshape(value.shape)
    return jnp.where(jnp.any(key_mask, axis=-1)[..., None, None, None], out, 0)
