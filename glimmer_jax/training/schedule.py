"""Learning rates as functions of the step (0 at the first update), float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]

KINDS = ("constant", "rsqrt", "linear")


def constant(rate: float, warmup_steps: int = 0) -> Schedule:
    """`rate`, after a linear warm-up of `warmup_steps` updates."""
    return lambda step: rate * _warmup(step, warmup_steps)


def rsqrt(rate: float, warmup_steps: int) -> Schedule:
    """T5's pre-training schedule: `rate / sqrt(max(step, warmup_steps))`, without a linear part."""
    return lambda step: rate * jax.lax.rsqrt(jnp.maximum(_float(step), float(warmup_steps)))


def linear(rate: float, warmup_steps: int, decay_steps: int) -> Schedule:
    """Linear warm-up over `warmup_steps`, then linear decay to 0 at `decay_steps`."""

    def schedule(step: jax.Array) -> jax.Array:
        left = (decay_steps - _float(step)) / max(decay_steps - warmup_steps, 1)
        return rate * jnp.minimum(_warmup(step, warmup_steps), jnp.clip(left, 0.0, 1.0))

    return schedule


def make_schedule(kind: str, rate: float, warmup_steps: int, decay_steps: int) -> Schedule:
    """The schedule of a kind, one of `KINDS`.

    Raises:
      ValueError: unknown kind, `rsqrt` without warm-up, or `linear` without an end.
    """
    if kind == "constant":
        return constant(rate, warmup_steps)
    if kind == "rsqrt":
        if warmup_steps < 1:
            raise ValueError(
                f"Schedule 'rsqrt' divides by sqrt(warmup_steps): give warmup_steps >= 1 (T5 used "
                f"10,000), got {warmup_steps}."
            )
        return rsqrt(rate, warmup_steps)
    if kind == "linear":
        if decay_steps <= warmup_steps:
            raise ValueError(
                f"Schedule 'linear' ends at decay_steps, which must be above warmup_steps; got "
                f"decay_steps={decay_steps}, warmup_steps={warmup_steps}."
            )
        return linear(rate, warmup_steps, decay_steps)
    raise ValueError(f"Schedule must be one of {', '.join(KINDS)}; got {kind!r}.")


def _float(step: jax.Array) -> jax.Array:
    return jnp.asarray(step, jnp.float32)


def _warmup(step: jax.Array, warmup_steps: int) -> jax.Array:
    # step + 1, because a rate of zero would waste the first update.
    return jnp.minimum(1.0, (_float(step) + 1.0) / max(warmup_steps, 1))
