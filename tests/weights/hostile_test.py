"""Hostile weight files: each is rejected with a message, or reads as the intact file does."""

import hashlib
import json
import random

import flax.traverse_util
import numpy as np
import orbax.checkpoint as ocp
import pytest

from glimmer_jax.weights import huggingface, parameters, params_file, t5_names, t5x
from glimmer_jax.weights.file_errors import InvalidWeights
from glimmer_jax.weights.load import load
from glimmer_jax.weights.model_config import config_from, describe
from glimmer_jax.weights.params_file import save_params_file
from tests import damage
from tests.models import tiny
from tests.weights import hostile_files
from tests.weights.huggingface_test import tensors_of, write_flax

DESCRIBED = describe(tiny.FID, "v")


def write(kind, folder):
    params = tiny.params(tiny.FID)
    if kind == "t5x":
        t5x.save(folder, params, DESCRIBED)
    elif kind in ("orbax", "ocdbt"):
        tree = {"target": flax.traverse_util.unflatten_dict(t5_names.flat_from(params), sep="/")}
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=kind == "ocdbt")
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder / "state", args=ocp.args.PyTreeSave(tree))
    else:
        size = 20_000 if kind == "index" else 10**9
        huggingface.save(folder, params, tiny.FID, DESCRIBED, file_bytes=size)
        if kind == "msgpack":
            write_flax(folder, tensors_of(folder), 1)


def check(path, intact, attack):
    """Loads everything: the numbers of the intact file, or a message that names the file."""
    message = ""
    try:
        params = parameters.read(load(path).params)
    except ValueError as error:
        message = str(error)
    if message:
        assert path.name in message or "parameter" in message, (attack, message)
        return False
    np.testing.assert_equal(params, intact, str(attack))
    return True


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", hostile_files.CHANGES)
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_hostile_files_are_rejected_or_read_correctly(tmp_path, kind, seed):
    folder = tmp_path / kind
    write(kind, folder)
    intact = parameters.read(load(folder).params)
    count = 2 * len(hostile_files.CHANGES[kind])
    accepted = 0
    for attack in hostile_files.attacks(kind, folder, seed=seed, count=count):
        accepted += check(folder, intact, attack)
    assert accepted < count / 2
    assert check(folder, intact, "restored") == 1


def changed(value, draw):
    """A JSON value with one hostile change somewhere."""
    container, key = draw.choice(list(damage.places(value)))
    container[key] = draw.choice(hostile_files.NUMBERS)
    return value


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_hostile_parameter_files_are_rejected_or_read_correctly(tmp_path, seed):
    path = tmp_path / "fid.safetensors"
    save_params_file(path, tiny.params(tiny.FID), DESCRIBED)
    intact = load(path).params
    draw = random.Random(seed)

    def sign(content):
        # The checksums are valid: only the content is hostile.
        del content["fields_sha256"]
        content["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        content["fields_sha256"] = params_file._fields_sha256(content)
        path.with_suffix(".json").write_text(json.dumps(content))

    text = path.with_suffix(".json").read_text()
    changes = hostile_files.CHANGES["safetensors"][:9]
    data = path.read_bytes()
    for change in changes:
        attack = change.__name__, change(tmp_path, draw)
        sign(json.loads(text))
        check(path, intact, attack)
        path.write_bytes(data)
    for _ in range(15):
        content = json.loads(text)
        content["model_config"] = changed(content["model_config"], draw)
        sign(content)
        check(path, intact, content["model_config"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_encoder_layers", 3_000_000),
        ("vocab_size", 2**63),
        ("emb_dim", "16"),
        ("dropout_rate", []),
        ("mlp_activations", [7]),
        ("scan_layers", 1),
    ],
)
def test_impossible_settings_are_rejected_before_anything_is_built(name, value):
    described = describe(tiny.FID, "v")
    described["model_config"]["t5"][name] = value
    with pytest.raises(InvalidWeights, match=f"file.*{name}"):
        config_from(described, "file")
