"""The benchmark's T5, the shape of a question, the systems, and their flags."""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from glimmer_jax.models.glimmer import GlimmerConfig, memory_layers, rerank_layers
from glimmer_jax.models.t5 import T5Config

JAX_SYSTEMS = ("fid", "lumen", "glimmer", "glimmer_fido")
SYSTEMS = ("pytorch_fid", *JAX_SYSTEMS)
# FiDO's decoder saves time per answer token, of which a training step has none. `glimmer_memory`
# trains from stored memory, with a frozen memory encoder.
TRAINING_SYSTEMS = ("pytorch_fid", "fid", "lumen", "glimmer", "glimmer_memory")
# int8: PyTorch's dynamic quantisation of linear layers, of pytorch_fid's answers on a CPU alone.
DTYPES = ("float32", "bfloat16", "int8")
SIZES: dict[str, dict[str, Any]] = {
    "base": dict(
        vocab_size=32128,
        emb_dim=768,
        num_heads=12,
        head_dim=64,
        mlp_dim=2048,
        num_encoder_layers=12,
        num_decoder_layers=12,
    ),
    # For tests, with all parts of the model.
    "tiny": dict(
        vocab_size=64,
        emb_dim=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        num_encoder_layers=6,
        num_decoder_layers=6,
    ),
}
DROPOUT, LEARNING_RATE = 0.1, 1e-4  # of training; GLIMMER's
ALPHA, BETA = 1 / 3, 1 / 4  # GLIMMER (arXiv 2306.10231): proportions of live and reranking layers
FIDO: dict[str, Any] = dict(cross_attention_period=6, decoder_kv_heads=1)  # arXiv 2212.08153


@dataclasses.dataclass(frozen=True)
class Setting:
    """Lengths in tokens; one question at a time, without padding."""

    size: str = "base"
    question: int = 32
    passage: int = 224
    answer: int = 16  # always in full: no token ends an answer
    passages: tuple[int, ...] = (10, 20, 40)
    kept: int = 5
    threads: int = 2
    training: bool = False  # a training step on the question instead of an answer to it

    def __post_init__(self):
        object.__setattr__(self, "passages", tuple(sorted(self.passages)))
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}; got {self.size!r}.")
        lengths = (self.question, self.passage, self.answer, self.kept, self.threads)
        if not self.passages or min(*self.passages, *lengths) < 1:
            raise ValueError(f"Lengths and counts must be at least 1, got {self}.")
        if self.kept > self.passages[0]:
            raise ValueError(
                f"--kept={self.kept} exceeds --passages {self.passages[0]}. Use more passages or a "
                "smaller --kept."
            )


def parser(
    program: str, description: str, systems: Sequence[str], default: Setting
) -> argparse.ArgumentParser:
    """The flags of a benchmark that compares systems; `from_flags` reads them."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.{program}", description=description)
    parser.add_argument("--json", type=pathlib.Path, required=True, help="output")
    parser.add_argument("--systems", nargs="+", choices=systems, default=systems)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: all; a GPU: bfloat16")
    parser.add_argument("--runs", type=int, default=5, help="undisturbed runs per row")
    parser.add_argument("--size", default=default.size, help="base, or tiny for tests")
    parser.add_argument("--question", type=int, default=default.question, help="tokens")
    parser.add_argument("--passage", type=int, default=default.passage, help="tokens")
    parser.add_argument("--answer", type=int, default=default.answer, help="tokens")
    parser.add_argument("--passages", type=int, nargs="+", default=default.passages)
    parser.add_argument(
        "--kept", type=int, default=default.kept, help="passages that GLIMMER keeps"
    )
    parser.add_argument("--threads", type=int, default=default.threads)
    return parser


def from_flags(flags: argparse.Namespace, training: bool = False) -> Setting:
    """The setting that the flags of `parser` describe."""
    return Setting(
        flags.size,
        flags.question,
        flags.passage,
        flags.answer,
        tuple(flags.passages),
        flags.kept,
        flags.threads,
        training,
    )


def t5_config(setting: Setting, dtype: str, on_cpu: bool, **decoder: Any) -> T5Config:
    """The T5 in `dtype`; on a CPU bfloat16 applies only to the operands of projections.

    A CPU runs layer after layer, without a scan, which converts and copies stacked parameters and
    gradients.
    """
    sizes: dict[str, Any] = {
        **SIZES[setting.size],
        "dropout_rate": DROPOUT if setting.training else 0.0,
        "scan_layers": not on_cpu,
    }
    if dtype == "float32":
        return T5Config(**sizes, **decoder)
    if on_cpu:
        return T5Config(**sizes, **decoder, matmul_dtype="bfloat16")
    return T5Config(**sizes, **decoder, dtype="bfloat16")


def glimmer_config(system: str, setting: Setting, dtype: str, on_cpu: bool) -> GlimmerConfig:
    """The cut and the decoder of one of our systems."""
    ours = (*JAX_SYSTEMS, "glimmer_memory")
    if system not in ours:
        raise ValueError(f"system must be one of {', '.join(ours)}; got {system!r}.")
    t5 = t5_config(setting, dtype, on_cpu, **(FIDO if system == "glimmer_fido" else {}))
    if system == "fid":
        return GlimmerConfig(t5)
    layers = t5.num_encoder_layers
    if system == "lumen":
        return GlimmerConfig(
            t5,
            memory_layers(layers, ALPHA),
            freeze_memory=True,
            share_question_encoder=False,
        )
    return GlimmerConfig(
        t5,
        memory_layers(layers, ALPHA),
        rerank_layers(layers, ALPHA, BETA),
        num_kept=setting.kept,
        freeze_memory=system == "glimmer_memory",
    )
