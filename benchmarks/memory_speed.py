"""Speed of a memory build relative to its encoder: the cost of reading, packing and writing.

    python -m benchmarks.memory_speed [--codecs bf16,int8,pq] [--folder /dev/shm] [--json OUT]

Interleaves three measurements of the same batches: the encoder without the codec, the encoder with
the codec (results stay on the device), and the complete job into `--folder`. Weights and tokens are
random. Passages have different lengths and are batched as in the job.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.memory import SyntheticPassages
from benchmarks.setting import SIZES
from glimmer_jax.memory import encoding
from glimmer_jax.memory.build import BuildConfig, build_memory
from glimmer_jax.memory.encoding import MemoryEncoder
from glimmer_jax.memory.manifest import EncodeProgram, Identity, Layout
from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.t5 import T5Config
from glimmer_jax.partitioning import MeshConfig, make_mesh

LENGTH = 256  # P
# T5 v1.1 small, fast enough for two cores, in addition to the sizes of the other benchmarks.
_SMALL = dict(vocab_size=32128, emb_dim=512, num_heads=6, head_dim=64, mlp_dim=1024)
_SIZES = {**SIZES, "small": dict(_SMALL, num_encoder_layers=8, num_decoder_layers=8)}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a row per codec."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--codecs", default="bf16,int8,pq")
    parser.add_argument("--size", default="small", choices=sorted(_SIZES))
    parser.add_argument("--passages", type=int, default=256, help="per round")
    parser.add_argument("--shard_passages", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16, help="passages per batch of a device")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="output; default: the system's temporary folder"
    )
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    rows = []
    for codec in args.codecs.split(","):
        rows.append(measure(codec, args))
        print(json.dumps(rows[-1]))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(codec: str, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds.

    Returns:
      `{codec, size, states_tokens_per_s, encode_tokens_per_s, job_tokens_per_s, of_states, of_encode,
      padding, mb_per_s}`. `states` is layers [0, M), `encode` includes the codec. `of_` is the median
      over rounds of the job's speed relative to theirs in the same round.
    """
    sizes = _SIZES[args.size]
    # A third of the layers live, as in the other benchmarks.
    config = GlimmerConfig(
        T5Config(**sizes), sizes["num_encoder_layers"] * 2 // 3, memory_codec=codec
    )
    model = GlimmerModel(config)
    shapes, _ = model.abstract_variables()
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (draw.standard_normal(x.shape) / 50).astype(x.dtype), shapes)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.device_put(params, jax.devices()[0])
    buckets = encoding.default_buckets(LENGTH, 64)
    encoder = MemoryEncoder(
        encoding.bind_encoder(model.memory_states, params, mesh, codec),
        Identity("sha256:random", "sha256:none", codec, config.t5.emb_dim, LENGTH),
        EncodeProgram(
            args.rows, buckets, config.t5.dtype, None, jax.default_backend(), jax.__version__
        ),
        codebooks=params.get("memory_codebooks"),
    )
    states = encoding.bind_states(model.memory_states, params, mesh)
    passages = SyntheticPassages(args.passages, 100, LENGTH)
    for bucket in buckets:
        empty = np.zeros((args.rows, bucket), np.int32)
        jax.block_until_ready((states(empty), encoder.encode(empty)))

    layout = Layout(args.shard_passages, chunk_tokens=64)
    seconds: dict[str, list[float]] = {"states": [], "encode": [], "job": []}
    for _ in range(args.rounds):
        seconds["states"].append(_alone(states, passages, encoder, layout))
        seconds["encode"].append(_alone(encoder.encode, passages, encoder, layout))
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            report = build_memory(
                encoder,
                passages,
                folder,
                passages_fingerprint="sha256:random",
                config=BuildConfig(layout),
            )
        seconds["job"].append(report.seconds)
    assert report.manifest is not None
    tokens, size = report.manifest.num_tokens, report.manifest.num_bytes
    rate = {f"{name}_tokens_per_s": tokens / statistics.median(x) for name, x in seconds.items()}
    relative = {
        f"of_{name}": statistics.median(np.divide(seconds[name], seconds["job"]).tolist())
        for name in ("states", "encode")
    }
    return {
        "codec": codec,
        "size": args.size,
        **{name: round(x, 1) for name, x in rate.items()},
        **{name: round(x, 3) for name, x in relative.items()},
        "padding": round(report.padding, 3),
        "mb_per_s": round(size / statistics.median(seconds["job"]) / 1e6, 2),
    }


def _alone(
    encode: Callable[[np.ndarray], Any],
    passages: SyntheticPassages,
    encoder: MemoryEncoder,
    layout: Layout,
) -> float:
    """Seconds for the job's batches, with one batch in flight."""
    work = []
    for start in range(0, len(passages), layout.shard_passages):
        rows = np.arange(start, min(start + layout.shard_passages, len(passages)))
        tokens, lengths = passages.tokens(rows, LENGTH), passages.lengths(rows)
        for group in encoding.groups(lengths, encoder.program.rows, encoder.program.buckets):
            batch = tokens[group.positions, : group.bucket]
            work.append(encoding.padded(batch, encoder.program.rows))
    running: deque[Any] = deque()
    began = time.monotonic()
    for batch in work:
        running.append(encode(batch))
        if len(running) > 1:
            jax.block_until_ready(running.popleft())
    jax.block_until_ready(list(running))
    return time.monotonic() - began


if __name__ == "__main__":
    main()
