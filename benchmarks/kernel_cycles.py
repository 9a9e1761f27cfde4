"""Static cycle counts of the TPU's attention kernel, from the schedules of XLA's TPU compiler.

    python -m benchmarks.kernel_cycles v5e:2x2    # prints a row of docs/preflight.md

The compiler gives no estimate for a Pallas kernel, but it writes down the schedule: instruction
bundles, one of which is issued per cycle unless the core waits. One step of the kernel handles one
sequence and the heads that fill 128 lanes. Nothing runs on a TPU.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

HEADS, CHANNELS, LENGTH, PASSAGES = 12, 64, 352, 10  # T5 Base, question and passage together
LANES = 128
# Cores of a chip, which share its peak.
CORES = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1, "tpu7x": 2}
TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
# Matrix products of two N x N x C arrays per head; the backward pass recomputes the logits.
PRODUCTS = {"forward": 2, "backward": 5}
_BUNDLES = re.compile(r"non empty scheduled bundles: (\d+)")


def row(topology: str) -> str:
    """Generation, cycles of one step, and the share of the peak that they reach."""
    from glimmer_jax.preflight import chips

    parsed = chips.parse_topology(topology)
    # Per cycle of one core.
    peak = parsed.chip.peak_flops / parsed.chip.clock / CORES[parsed.generation]
    heads = LANES // CHANNELS
    flops = 2 * heads * LENGTH**2 * CHANNELS
    found = cycles(topology)
    shares = [PRODUCTS[name] * flops / peak / found[name] for name in PRODUCTS]
    cells = [parsed.generation, *(f"{found[name]:,}" for name in PRODUCTS)]
    return f"| {' | '.join([*cells, *(f'{share:.2f}' for share in shares)])} |"


def cycles(topology: str) -> dict[str, int]:
    """Bundles of one step, forward and backward; compiled in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
        # Cached programs would not be compiled, and so not be dumped.
        environment |= {"LIBTPU_INIT_ARGS": dump, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        code = f"from benchmarks.kernel_cycles import compile_kernel; compile_kernel({topology!r})"
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        return read_schedules(pathlib.Path(folder))


def read_schedules(folder: pathlib.Path) -> dict[str, int]:
    """The kernels' bundles in a dump.

    Raises ValueError if it does not hold one forward and one backward kernel.
    """
    found: dict[str, int] = {}
    for path in sorted(folder.glob("*schedule-analysis_final_bundles.txt")):
        text = path.read_text(errors="replace")
        count = _BUNDLES.search(text)
        if 'custom_call_target="tpu_custom_call"' in text and count:
            found["backward" if "transpose(jvp" in text else "forward"] = int(count[1])
    if found.keys() != {"forward", "backward"}:
        raise ValueError(
            f"{folder}: expected the schedules of a forward and a backward kernel, found "
            f"{sorted(found)}. Another version of libtpu may name them differently."
        )
    return found


def compile_kernel(topology: str) -> None:
    """Compiles a gradient of the kernel for T5 Base in bfloat16."""
    import jax
    import jax.numpy as jnp

    from glimmer_jax import axes, partitioning
    from glimmer_jax.nn import tpu_attention
    from glimmer_jax.preflight import chips

    devices = chips.devices(chips.parse_topology(topology))
    rows = len(devices)
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=1, fsdp=rows), devices)
    by_row = jax.NamedSharding(mesh, partitioning.spec((axes.BATCH,)))
    shape = (rows, PASSAGES, LENGTH)
    states = jax.ShapeDtypeStruct((*shape, HEADS, CHANNELS), jnp.bfloat16, sharding=by_row)
    mask = jax.ShapeDtypeStruct(shape, bool, sharding=by_row)
    bias = jax.ShapeDtypeStruct(
        (HEADS, LENGTH, LENGTH), jnp.float32, sharding=partitioning.replicated(mesh)
    )

    def total(query, key, value, bias, mask):
        return jnp.sum(tpu_attention.attend(query, key, value, mask, bias).astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        jax.jit(jax.grad(total, (0, 1, 2, 3))).lower(states, states, states, bias, mask).compile()


if __name__ == "__main__":
    print(row(sys.argv[1]))
