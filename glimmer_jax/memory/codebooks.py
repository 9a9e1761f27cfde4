"""Codebooks of product-quantised memory, learnt from a sample of passages on the device mesh.

Each channel is normalised to mean 0 and variance 1; principal directions are allocated to the subspaces
so that the products of their variances are balanced (Ge et al., 2013, "Optimized Product Quantization",
section 3.2); k-means then finds the centroids of every subspace, each device summing over its own part of
the sample. It starts from k-means++ (Arthur and Vassilvitskii, 2007) on up to 65,536 of the tokens.

A sample of N tokens takes 4 N D bytes of the host's RAM, and as much again distributed over the devices:
31 GB each for ten million tokens of 768 channels. Everything else is small in comparison.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glimmer_jax.codecs import Codec, ProductQuantisation, nearest
from glimmer_jax.memory import encoding
from glimmer_jax.memory.encoding import States
from glimmer_jax.memory.source import Passages
from glimmer_jax.runtime.preemption import STOP

Codebooks = dict[str, np.ndarray]
_ROWS = 16384  # of a sample at a time: bounds RAM for samples of millions
_START_TOKENS = 65536  # that initial centroids are drawn from
# Iterations of k-means in one call: a stop is noticed between calls.
_ITERATIONS = 5


def sample_states(
    states: States,
    passages: Passages,
    *,
    tokens: int,
    rows: int,
    buckets: Sequence[int],
    devices: int,
    seed: int = 0,
) -> np.ndarray:
    """States of the tokens of randomly drawn passages, float32 `[<= tokens, D]`.

    Args:
      states: int32 tokens `[n, P]` -> states `[n, P, D]`.
      passages: the corpus.
      tokens: size of the sample; a smaller corpus gives fewer.
      rows: passages in the batch of one device.
      buckets: lengths that a batch may be padded to; longer passages are truncated.
      devices: over which a call of `states` distributes its rows.
      seed: of the draw.
    """
    chosen = np.random.default_rng(seed).permutation(len(passages))
    lengths = np.minimum(passages.lengths(chosen), buckets[-1])
    count = int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), tokens)) + 1
    chosen, lengths = chosen[:count], lengths[:count]
    # In the order of the draw, so that any part is a random sample: groups are sorted by length.
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    # Allocated once, when the channels are known: concatenating parts would take twice the RAM.
    sample: np.ndarray | None = None
    for group in encoding.groups(lengths, rows * devices, buckets):
        STOP.poll_together()
        tokens_nP = passages.tokens(chosen[group.positions], group.bucket)
        batch = encoding.padded(tokens_nP, rows * devices)
        encoded = np.asarray(states(batch), np.float32)[: len(group.positions)]
        real = np.arange(group.bucket) < lengths[group.positions][:, None]
        if sample is None:
            sample = np.empty((int(lengths.sum(dtype=np.int64)), encoded.shape[-1]), np.float32)
        sample[(starts[group.positions][:, None] + np.arange(group.bucket))[real]] = encoded[real]
    assert sample is not None
    return sample[:tokens]


def learn(
    codec: ProductQuantisation,
    states_ND: np.ndarray,
    mesh: Mesh,
    iterations: int = 25,
    seed: int = 0,
) -> Codebooks:
    """Codebooks for `codec` from a sample of states; deterministic for a given mesh and seed.

    Args:
      codec: with its sizes.
      states_ND: float `[N, D]`; a few hundred per code are enough.
      mesh: the sample is distributed over all its devices.
      iterations: of k-means.
      seed: of the initial centroids.

    Raises:
      ValueError: there are fewer states than codes, or a state is not finite.
    """
    states_ND = np.asarray(states_ND, np.float32)
    count, emb_dim = states_ND.shape
    if count < codec.num_codes:
        raise ValueError(
            f"Codebooks of {codec.num_codes} codes need a sample of at least as many tokens, but this "
            f"one has {count}. Raise SAMPLE_TOKENS, use more passages, or choose a codec of fewer codes."
        )
    # NaN and infinity show in the sums; numpy would warn about infinities that cancel.
    with np.errstate(invalid="ignore"):
        mean = sum(piece.sum(0, dtype=np.float64) for piece in _pieces(states_ND)) / count
    if not np.isfinite(mean).all():
        raise ValueError(
            "The memory encoder gave NaN or infinity for passages of the sample. Check the checkpoint "
            "(did its training diverge?) and the activation dtype."
        )
    variance = sum(np.square(piece - mean).sum(0) for piece in _pieces(states_ND)) / count
    deviation = np.sqrt(variance)
    # A constant channel needs no code.
    scale = np.where(deviation > 0, deviation, 1.0)
    books: Codebooks = {
        "mean": mean.astype(np.float32),
        "scale": scale.astype(np.float32),
        "basis": np.eye(emb_dim, dtype=np.float32),
    }
    scaled_ND, weights = _scaled_on_mesh(states_ND, books, mesh)
    products = jax.jit(lambda x: jnp.matmul(x.T, x, precision="highest"))(scaled_ND)
    books["basis"] = even_basis(np.asarray(products, np.float64) / count, codec.channels)

    drawn = np.random.default_rng(seed).permutation(count)[: max(_START_TOKENS, codec.num_codes)]
    rotated = ((states_ND[drawn] - books["mean"]) / books["scale"]) @ books["basis"]
    points_GNS = rotated.reshape(len(drawn), -1, codec.channels).swapaxes(0, 1)
    keys = jax.random.split(jax.random.key(seed), len(points_GNS))
    start = []
    for points_NS, key in zip(points_GNS, keys, strict=True):
        STOP.poll_together()
        start.append(np.asarray(plus_plus(points_NS, key, codec.num_codes)))
    spare_GCS = points_GNS[:, : codec.num_codes].copy()
    centroids, counts = _kmeans(
        scaled_ND, weights, books["basis"], np.stack(start), spare_GCS, iterations, mesh
    )
    frequencies = (counts / count).astype(np.float32)
    return {"centroids": centroids, "frequencies": frequencies, **books}


@functools.partial(jax.jit, static_argnames="num_codes")
def plus_plus(points_NS: jax.Array, key: jax.Array, num_codes: int) -> jax.Array:
    """Initial centroids float32 `[num_codes, S]`, drawn from the points by k-means++.

    Each is drawn with a probability proportional to the squared distance to the nearest one so far.
    """
    keys = jax.random.split(key, num_codes)

    def draw(c: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        centroids_CS, square_N = state
        # All are infinite before the first draw, which is uniform.
        logits_N = jnp.where(c > 0, jnp.log(square_N), 0.0)
        new_S = points_NS[jax.random.categorical(keys[c], logits_N)]
        square_N = jnp.minimum(square_N, jnp.square(points_NS - new_S[None]).sum(-1))
        return centroids_CS.at[c].set(new_S), square_N

    start = jnp.zeros((num_codes, points_NS.shape[1])), jnp.full(len(points_NS), jnp.inf)
    return jax.lax.fori_loop(0, num_codes, draw, start)[0]


def _pieces(states_ND: np.ndarray) -> Iterator[np.ndarray]:
    """The states, `_ROWS` at a time; a job may be stopped between two pieces."""
    for first in range(0, len(states_ND), _ROWS):
        STOP.poll_together()
        yield states_ND[first : first + _ROWS]


def _scaled_on_mesh(
    states_ND: np.ndarray, books: Codebooks, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Normalised states, distributed over all devices, and a weight for each.

    Padded to equal parts with states of weight 0. Built for one device after the other, so the host never
    holds a second copy of all states.
    """
    count, emb_dim = states_ND.shape
    share = -(-count // mesh.size)
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shape = (share * mesh.size, emb_dim)
    parts = []
    for device, index in rows.addressable_devices_indices_map(shape).items():
        assert index is not None
        first = index[0].start or 0
        part = np.zeros((share, emb_dim), np.float32)
        own_ND = states_ND[first : first + share]
        np.subtract(own_ND, books["mean"], out=part[: len(own_ND)])
        part[: len(own_ND)] /= books["scale"]
        parts.append(jax.device_put(part, device).block_until_ready())
    scaled_ND = jax.make_array_from_single_device_arrays(shape, rows, parts)
    weights = jax.device_put((np.arange(shape[0]) < count).astype(np.float32), rows)
    return scaled_ND, weights


def even_basis(covariance_DD: np.ndarray, channels: int) -> np.ndarray:
    """Orthogonal float32 `[D, D]` whose columns are principal directions, grouped by subspace.

    Each direction, largest variance first, goes to the subspace that is not full and whose variances have
    the smallest product so far: the error of a code depends on that product.
    """
    variances, directions = np.linalg.eigh(covariance_DD)
    subspaces: list[list[int]] = [[] for _ in range(len(variances) // channels)]
    floor = max(float(variances[-1]), 1e-30) * 1e-9
    logs = np.log(np.maximum(variances, floor) / floor)
    products = np.zeros(len(subspaces))
    for index in np.argsort(-variances, kind="stable"):
        room = [len(members) < channels for members in subspaces]
        to = int(np.argmin(np.where(room, products, np.inf)))
        subspaces[to].append(int(index))
        products[to] += logs[index]
    return directions[:, np.concatenate(subspaces)].astype(np.float32)


def _kmeans(
    scaled_ND: jax.Array,
    weights_N: jax.Array,
    basis_DD: np.ndarray,
    start_GCS: np.ndarray,
    spare_GCS: np.ndarray,
    iterations: int,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's iterations in every subspace; a centroid without points is replaced by a spare point.

    Returns the centroids and the number of points nearest to each.

    Letters: N points, D channels, G subspaces of S channels, C centroids of a subspace.
    """
    num_codes, channels = start_GCS.shape[1:]
    axes = mesh.axis_names
    rows, replicated = PartitionSpec(axes), PartitionSpec()
    sharded = functools.partial(jax.shard_map, mesh=mesh)

    @jax.jit
    @functools.partial(sharded, in_specs=(rows, replicated), out_specs=rows)
    def rotate(scaled_ND, basis_DS):
        return jnp.matmul(scaled_ND, basis_DS, precision="highest")

    def assign(points_NS, weights_N, centroids_CS):
        codes_N = nearest(points_NS, centroids_CS)
        sums = jax.ops.segment_sum(points_NS * weights_N[:, None], codes_N, num_codes)
        counts = jax.ops.segment_sum(weights_N, codes_N, num_codes)
        return jax.lax.psum((sums, counts), axes)

    @jax.jit
    @functools.partial(sharded, in_specs=(rows, rows, *(replicated,) * 4), out_specs=replicated)
    def lloyd(points_NS, weights_N, centroids_CS, spare_CS, first, last):
        def iterate(step, centroids_CS):
            sums, counts = assign(points_NS, weights_N, centroids_CS)
            counts = counts[:, None]
            others_CS = jnp.roll(spare_CS, step, axis=0)
            return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), others_CS)

        return jax.lax.fori_loop(first, last, iterate, centroids_CS)

    @jax.jit
    @functools.partial(sharded, in_specs=(rows, rows, replicated), out_specs=replicated)
    def count(points_NS, weights_N, centroids_CS):
        return assign(points_NS, weights_N, centroids_CS)[1]

    everywhere = NamedSharding(mesh, replicated)
    basis_GDS = basis_DD.reshape(len(basis_DD), -1, channels).swapaxes(0, 1)
    learnt_GCS, counts_GC = np.empty_like(start_GCS), np.empty(start_GCS.shape[:2], np.float32)
    for group, inputs in enumerate(zip(basis_GDS, start_GCS, spare_GCS, strict=True)):
        basis_DS, centroids_CS, spare_CS = jax.device_put(inputs, everywhere)
        # Rotated one subspace at a time: a device has room for only one copy of its part.
        points_NS = rotate(scaled_ND, basis_DS)
        for first in range(0, iterations, _ITERATIONS):
            STOP.poll_together()
            steps = np.int32(first), np.int32(min(first + _ITERATIONS, iterations))
            centroids_CS = lloyd(points_NS, weights_N, centroids_CS, spare_CS, *steps)
            centroids_CS.block_until_ready()
        learnt_GCS[group] = centroids_CS
        counts_GC[group] = count(points_NS, weights_N, centroids_CS)
    return learnt_GCS, counts_GC


def relative_error(codec: Codec, books: Codebooks | None, states_ND: np.ndarray) -> float:
    """Root mean square of the codec's error on these states, relative to that of the states."""
    stored = jax.jit(lambda x, books: codec.decode(codec.encode(x, books), jnp.float32, books))
    square_error = square = 0.0
    for piece in _pieces(states_ND):
        exact = np.asarray(piece, np.float64)
        square_error += np.square(np.asarray(stored(piece, books), np.float64) - exact).sum()
        square += np.square(exact).sum()
    return float(np.sqrt(square_error / square))
