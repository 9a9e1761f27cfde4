import jax
import jax.numpy as jnp

from benchmarks import flops


def test_a_product_counts_twice_its_multiply_adds():
    def product(x, y):
        return jnp.einsum("bij,bjk->bik", x, y)

    trace = jax.make_jaxpr(product)(jnp.ones((2, 3, 5)), jnp.ones((2, 5, 7)))
    assert flops.count(trace, tokens=1) == 2 * 2 * 3 * 5 * 7


def test_loops_count_as_often_as_they_run():
    def loops(x):
        x = jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0]
        return jax.lax.while_loop(lambda x: jnp.all(x > 0), jax.jit(lambda x: x @ x), x)

    trace = jax.make_jaxpr(loops)(jnp.ones((4, 4)))
    assert flops.count(trace, tokens=5) == (3 + 5) * 2 * 4**3
