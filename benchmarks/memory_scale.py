"""RAM and time of a build with many synthetic passages and a tiny encoder.

    python -m benchmarks.memory_scale --passages N [--folder DIR] [--json OUT]

Tokens are computed on demand, so that only the build itself takes RAM. Prints seconds and resident
memory after each tenth, the number and bytes of files, and the time to open the store.
"""

import argparse
import itertools
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.memory import SyntheticPassages
from glimmer_jax.memory import build, encoding
from glimmer_jax.memory.encoding import MemoryEncoder
from glimmer_jax.memory.manifest import EncodeProgram, Identity, Layout
from glimmer_jax.memory.store import MemoryStore
from glimmer_jax.partitioning import MeshConfig, make_mesh

EMB_DIM, MAX_LENGTH, ROWS = 16, 32, 512
LAYOUT = Layout(shard_passages=8192, chunk_tokens=64)


def main(argv: Sequence[str] | None = None) -> None:
    """Builds and opens the memory, and prints the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(args.passages, args.folder or Path(temporary) / "memory")
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(count: int, path: Path) -> dict[str, Any]:
    """Builds a memory of `count` passages at `path` and opens it."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    table = jnp.asarray(np.random.default_rng(0).normal(size=(92, EMB_DIM)), jnp.float32)
    encode = encoding.bind_encoder(
        lambda params, tokens: params["table"][tokens], {"table": table}, mesh, "bf16"
    )
    began = time.monotonic()
    calls = itertools.count(1)
    marks: list[list[float]] = []

    def marked_encode(tokens: np.ndarray) -> Any:
        passages = next(calls) * ROWS
        if passages >= count * (len(marks) + 1) / 10:
            seconds = round(time.monotonic() - began, 1)
            marks.append([passages, seconds, _resident_mb()])
        return encode(tokens)

    encoder = MemoryEncoder(
        marked_encode,
        Identity("sha256:synthetic", "sha256:synthetic", "bf16", EMB_DIM, MAX_LENGTH),
        EncodeProgram(
            ROWS, (8, 16, 24, MAX_LENGTH), "float32", None, jax.default_backend(), jax.__version__
        ),
    )
    report = build.build_memory(
        encoder,
        SyntheticPassages(count, 8, MAX_LENGTH),
        path,
        passages_fingerprint="sha256:synthetic",
        config=build.BuildConfig(LAYOUT),
    )
    manifest = report.manifest
    assert manifest is not None
    opening = time.monotonic()
    store = MemoryStore.open(path)
    opened = time.monotonic() - opening
    store.read(np.arange(0, count, max(count // 64, 1)), MAX_LENGTH)
    files = [file for file in path.rglob("*") if file.is_file()]
    payload = manifest.num_tokens * EMB_DIM * 2
    arrays = sum(
        file.stat().st_size for file in path.glob("shards/*/states/**/*") if file.is_file()
    )
    return {
        "passages": count,
        "tokens": manifest.num_tokens,
        "seconds": round(report.seconds, 1),
        "passages_per_s": round(report.passages_per_s, 1),
        "padding": round(report.padding, 4),
        "passages_seconds_resident_mb": marks,
        "peak_resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "states_over_real_tokens": round(arrays / payload, 4),
        "opened_in_s": round(opened, 2),
    }


def _resident_mb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


if __name__ == "__main__":
    main()
