"""The parameter tree of every size as a golden: names, shapes, dtypes and axes; nothing is computed.

After an intended change, check the printed difference and rewrite the goldens:

    GLIMMER_REWRITE_GOLDENS=1 python -m pytest tests/models/sizes_test.py
"""

import functools
import json
import math
import os
import pathlib

import gin
import jax
import pytest

from glimmer_jax.models.glimmer import GlimmerConfig, memory_layers, rerank_layers
from glimmer_jax.models.model import GlimmerModel
from glimmer_jax.models.t5 import T5Config

GOLDENS = pathlib.Path(__file__).parent / "goldens"
SIZES = pathlib.Path(__file__).parents[2] / "gin" / "sizes"
OLD = ("t5_1_0/small", "t5_1_0/base", "t5_1_0/large", "t5_1_0/3b", "t5_1_0/11b")
NAMES = ("tiny", "small", "base", "large", "xl", "xxl", *OLD)
# What the published checkpoints hold.
NUM_PARAMETERS = {
    "small": 76_961_152,
    "base": 247_577_856,
    "large": 783_150_080,
    "xl": 2_849_757_184,
    "xxl": 11_135_332_352,
    "t5_1_0/small": 60_506_624,
    "t5_1_0/base": 222_903_552,
    "t5_1_0/large": 737_668_096,
    "t5_1_0/3b": 2_851_598_336,
    "t5_1_0/11b": 11_307_321_344,
}
# config.json of t5-small to t5-11b: d_model, d_ff, d_kv, heads, layers.
T5_1_0 = {
    "small": (512, 2048, 64, 8, 6),
    "base": (768, 3072, 64, 12, 12),
    "large": (1024, 4096, 64, 16, 24),
    "3b": (1024, 16384, 128, 32, 24),
    "11b": (1024, 65536, 128, 128, 24),
}


@functools.cache
def t5(size):
    """The T5Config of a gin file."""
    gin.clear_config()
    gin.parse_config_file(str(SIZES / f"{size}.gin"))
    config = gin.get_configurable(T5Config)()
    gin.clear_config()
    return config


def glimmer(size, **kwargs):
    """The main setting: a third of the layers is live, a quarter of those reranks."""
    layers = t5(size).num_encoder_layers
    cut = dict(
        memory_layers=memory_layers(layers, 1 / 3),
        rerank_layers=rerank_layers(layers, 1 / 3, 1 / 4),
    )
    return GlimmerConfig(t5(size), **cut, **kwargs)


def test_every_size_has_a_golden():
    found = {path.relative_to(SIZES).with_suffix("").as_posix() for path in SIZES.rglob("*.gin")}
    assert found == set(NAMES)


@pytest.mark.parametrize("size", T5_1_0)
def test_t5_1_0_has_the_sizes_of_its_published_config(size):
    config = t5(f"t5_1_0/{size}")
    sizes = (config.emb_dim, config.mlp_dim, config.head_dim, config.num_heads)
    assert (*sizes, config.num_encoder_layers) == T5_1_0[size]
    assert config.num_decoder_layers == config.num_encoder_layers
    assert (config.mlp_activations, config.tie_output, config.vocab_size) == (
        ("relu",),
        True,
        32128,
    )


def describe(config):
    """`{path: [shape, dtype, axes]}` of a setting's parameters."""
    params, names = GlimmerModel(config).abstract_variables()
    names = dict(
        jax.tree_util.tree_leaves_with_path(names, is_leaf=lambda leaf: isinstance(leaf, tuple))
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [
            list(leaf.shape),
            str(leaf.dtype),
            list(names[path]),
        ]
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def check_golden(name, tree):
    path = GOLDENS / f"{name}.json"
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(tree.items()))
    text = f"{{\n{lines}\n}}\n"
    if os.environ.get("GLIMMER_REWRITE_GOLDENS") == "1":
        path.write_text(text)
    stored = json.loads(path.read_text()) if path.exists() else {}
    assert tree == stored, f"{path.name} should be:\n{text}"


@pytest.mark.parametrize("size", NAMES)
def test_glimmer_of_every_size_has_the_golden_parameters(size):
    check_golden(f"glimmer_{size.replace('/', '_')}", describe(glimmer(size)))


def test_every_optional_part_has_the_golden_parameters():
    """Frozen memory with its embedding, a question encoder, a reranker of its own."""
    config = glimmer(
        "small", freeze_memory=True, share_question_encoder=False, separate_reranker=True
    )
    check_golden("glimmer_small_all_parts", describe(config))


@functools.cache
def count(config):
    return sum(math.prod(shape) for shape, *_ in describe(config).values())


@pytest.mark.parametrize("size", NUM_PARAMETERS)
def test_fid_has_as_many_parameters_as_published_t5(size):
    assert count(GlimmerConfig(t5(size))) == NUM_PARAMETERS[size]


def test_glimmer_adds_a_position_table_and_a_score_head():
    base = t5("base")
    extra = count(glimmer("base")) - count(GlimmerConfig(t5("base")))
    assert extra == base.num_heads * 32 + 2 * base.emb_dim
