"""Exported models are read bit-exactly, under the names of the documented tables."""

import dataclasses
import pathlib
import re

import pytest
import safetensors.numpy

from glimmer_jax.models.recut import recut
from glimmer_jax.weights import huggingface, t5_names, t5x
from glimmer_jax.weights.huggingface_names import their_name
from glimmer_jax.weights.load import load
from glimmer_jax.weights.model_config import describe
from tests.models import tiny

FORMS = {"huggingface": huggingface, "t5x": t5x}
GATED_RELU = dataclasses.replace(tiny.T5, mlp_activations=("relu", "linear"))
FIDO = dataclasses.replace(tiny.T5, cross_attention_period=2, decoder_kv_heads=1)
LARGE = dataclasses.replace(
    FIDO, num_decoder_layers=6, decoder_num_heads=8, decoder_head_dim=6, decoder_mlp_dim=48
)
SETTINGS = {
    "FiD": dataclasses.replace(tiny.FID, t5=GATED_RELU),
    "GLIMMER": tiny.GLIMMER,
    "all parts": dataclasses.replace(tiny.FROZEN, separate_reranker=True),
    "one table": dataclasses.replace(tiny.GLIMMER, share_position_table=True),
    "no memory": dataclasses.replace(tiny.GLIMMER, memory_layers=0),
    "FiDO": dataclasses.replace(tiny.LUMEN, t5=FIDO),
    "a decoder larger than its encoder": dataclasses.replace(tiny.LUMEN, t5=LARGE),
    "codebooks": dataclasses.replace(tiny.GLIMMER, memory_codec="pq"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_every_model_is_exported_and_read_bit_exactly(tmp_path, form, setting):
    config = SETTINGS[setting]
    params = tiny.params(config)
    own = (config,) if form == "huggingface" else ()
    FORMS[form].save(tmp_path, params, *own, describe(config, "v"))
    loaded = load(tmp_path)
    tiny.assert_trees_equal(recut(loaded.params, loaded.config, config), params)
    assert loaded.vocabulary_fingerprint == "v"


def test_a_divided_encoder_has_consecutive_layers_and_two_tables(tmp_path):
    config = tiny.GLIMMER
    huggingface.save(tmp_path, tiny.params(config), config, describe(config, "v"))
    names = safetensors.numpy.load_file(tmp_path / "model.safetensors").keys()
    fid = {their_name(name, tiny.FID) for name in t5_names.shapes(tiny.FID)}
    # Parameters that a T5 does not have.
    table = "encoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight"
    assert names - fid == {table, "reranker.final_layer_norm.weight", "reranker.kernel"}
    assert not fid - names


def test_parameter_names_are_unique():
    for config in SETTINGS.values():
        names = t5_names.shapes(config)
        assert len({their_name(name, config) for name in names}) == len(names)


def rows(section):
    """The cells of a table's rows whose first cell begins with code."""
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def expand(ours, theirs):
    """Pairs of names from a pair with `{a,b}` in both."""
    listed = re.search(r"\{(\w+(?:,\w+)+)\}", ours)
    if listed is None:
        return [(ours, theirs)]
    values = re.search(r"\{(\w+(?:,\w+)+)\}", theirs)[1].split(",")
    return [
        (re.sub(r"\{\w+(?:,\w+)+\}", key, ours), re.sub(r"\{\w+(?:,\w+)+\}", value, theirs))
        for key, value in zip(listed[1].split(","), values, strict=True)
    ]


def documented_layers(section):
    """(names within a layer of an encoder, names within a layer of the decoder)."""
    layers = {"encoder": [], "decoder": []}
    for names, *columns in rows(section):
        codes = re.findall(r"`([^`]+)`", names)
        ours = {"encoder": codes[0], "decoder": codes[0]}
        if len(codes) > 1:
            # `pre_self_attention_…` for `pre_attention_layer_norm/scale`.
            prefix = codes[1].removesuffix("…")
            ours["decoder"] = prefix + codes[0].removeprefix(prefix.replace("self_", ""))
        encoder, decoder = columns
        cells = {"encoder": encoder, "decoder": encoder if decoder == "the same" else decoder}
        for stack, cell in cells.items():
            if cell:
                layers[stack] += expand(ours[stack], cell.strip("`"))
    return layers


def test_the_documented_tables_name_every_parameter():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    sections = dict(section.split("\n", 1) for section in text.split("\n### ")[1:])
    layers = documented_layers(sections["Layers"])
    # L = 4, M = 2, R = 1
    config = dataclasses.replace(SETTINGS["all parts"], memory_codec="pq")
    documented = {}
    for cells in rows(sections["Parts"]):
        ours, theirs = (cell.strip("`") for cell in cells)
        if "{i}" not in ours:
            documented |= {name: their.replace("{M}", "2") for name, their in expand(ours, theirs)}
            continue
        stack, start = re.fullmatch(r"(.+)\{(.*)i\}", theirs).groups()
        kind = "decoder" if ours.startswith("decoder") else "encoder"
        for i in range(2):
            block = i + {"": 0, "M+": 2, "M+R+": 3}[start]
            for rest, their_rest in layers[kind]:
                documented[f"{ours.replace('{i}', str(i))}/{rest}"] = f"{stack}{block}.{their_rest}"
    names = {name: their_name(name, config) for name in t5_names.shapes(config)}
    assert {name: documented[name] for name in names} == names
