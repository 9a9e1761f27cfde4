"""GTR as sentence-transformers publishes it: a folder of modules, of which ours are four.

    modules.json                       which modules, and where
    config.json, model.safetensors     0: the T5 encoder, as Hugging Face writes it
    spiece.model                       its vocabulary
    sentence_bert_config.json          tokens of a text at most
    1_Pooling/config.json              1: the mean over tokens
    2_Dense/config.json, model.safetensors
                                       2: the linear layer
                                       3: length 1; it has no files

Published folders may hold `2_Dense/pytorch_model.bin` instead: a pickle, which is not read.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import flax.traverse_util
import numpy as np
import safetensors.numpy

from glimmer_jax.models.t5 import T5Config
from glimmer_jax.storage.folder import open_folder
from glimmer_jax.storage.json_lines import parse_line
from glimmer_jax.weights import huggingface, t5_names
from glimmer_jax.weights import huggingface_names as names

MODULES = ["Transformer", "Pooling", "Dense", "Normalize"]
_VOCABULARY, _LENGTHS, _WEIGHTS = "spiece.model", "sentence_bert_config.json", "model.safetensors"
_DENSE = "linear.weight"
_DEFAULT_LENGTH = 512
# Settings that change what the same parameters compute, beyond rounding.
_SETTINGS = ("num_heads", "head_dim", "mlp_activations", "relpos_buckets", "relpos_max_distance")


@dataclasses.dataclass(frozen=True)
class LoadedGtr:
    """What a folder holds."""

    params: dict[str, Any]  # of `models.gtr.Gtr` with looped layers, float32 numpy
    t5: T5Config
    vector_dim: int  # E
    max_length: int  # tokens of a text, end token included
    vocabulary: bytes  # a SentencePiece model
    what: str  # what was found, for people

    @property
    def fingerprint(self) -> str:
        """`sha256:…` over parameters and the settings they are used with."""
        settings = {name: getattr(self.t5, name) for name in _SETTINGS}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, leaf in sorted(flax.traverse_util.flatten_dict(self.params, sep="/").items()):
            digest.update(f"{name} {leaf.shape}\n".encode() + leaf.tobytes())
        return f"sha256:{digest.hexdigest()}"

    @property
    def vocabulary_fingerprint(self) -> str:
        """`sha256:…` of the SentencePiece model."""
        return f"sha256:{hashlib.sha256(self.vocabulary).hexdigest()}"


def load_gtr(path: Any) -> LoadedGtr:
    """Reads a folder to the host.

    Raises:
      ValueError: files are missing or pickled, the modules are not GTR's, or parameters are missing,
        extra or misshapen.
    """
    path = pathlib.Path(path)
    root, pooling, dense = (path / place for place in _modules(path))
    _check_pooling(pooling / "config.json")
    kernel = _dense_kernel(dense)
    config = _read_json(root / "config.json")
    t5 = names.read_config(root, config, tie_output=False)
    if kernel.shape[0] != t5.emb_dim:
        raise ValueError(
            f"{dense} takes {kernel.shape[0]} channels, and the encoder in {root} gives {t5.emb_dim}. "
            "Fetch the folder again, whole."
        )
    flat = {**_encoder(root, t5), "projection/kernel": kernel}
    lengths = root / _LENGTHS
    max_length = _read_json(lengths).get("max_seq_length") if lengths.is_file() else None
    if not (root / _VOCABULARY).is_file():
        raise ValueError(
            f"{root} has no {_VOCABULARY}, the SentencePiece model of its vocabulary. Put T5's there; "
            "tokenizer.json alone is not read."
        )
    count = sum(leaf.size for leaf in flat.values())
    return LoadedGtr(
        flax.traverse_util.unflatten_dict(flat, sep="/"),
        t5,
        int(kernel.shape[1]),
        int(max_length or _DEFAULT_LENGTH),
        (root / _VOCABULARY).read_bytes(),
        f"a GTR in {path}: {count:,} parameters, {t5.num_encoder_layers} layers of width "
        f"{t5.emb_dim}, vectors of {kernel.shape[1]}",
    )


def _modules(path: pathlib.Path) -> list[str]:
    """Folders of encoder, pooling and linear layer, inside `path`."""
    if not (path / "modules.json").is_file():
        raise ValueError(
            f"{path} has no modules.json: it is not a folder of sentence-transformers. Give the "
            "folder of a GTR, such as gtr-t5-base, whole."
        )
    try:
        listed = json.loads((path / "modules.json").read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}/modules.json is no JSON: {error}. Fetch it again.") from None
    found = [module["type"].rpartition(".")[2] for module in listed]
    if found != MODULES:
        raise ValueError(
            f"{path} holds the modules {found}, and GTR's are {MODULES}. Give the folder of a GTR, "
            "such as gtr-t5-base."
        )
    return [module["path"] for module in listed[:3]]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing. Fetch the encoder's folder again, whole.")
    return parse_line(path.read_bytes(), str(path))


def _check_pooling(path: pathlib.Path) -> None:
    config = _read_json(path)
    modes = {name for name, value in config.items() if name.startswith("pooling_mode_") and value}
    # One name instead of many flags, in newer folders.
    modes |= (
        {f"pooling_mode_{config['pooling_mode']}_tokens"} if "pooling_mode" in config else set()
    )
    if modes != {"pooling_mode_mean_tokens"}:
        raise ValueError(
            f"{path} asks for {sorted(modes)}, and GTR takes the mean over tokens "
            "(pooling_mode_mean_tokens) alone. Give the folder of a GTR."
        )


def _dense_kernel(path: pathlib.Path) -> np.ndarray:
    config = _read_json(path / "config.json")
    activation = config.get("activation_function", "").rpartition(".")[2]
    if config.get("bias", True) or activation != "Identity":
        raise ValueError(
            f"{path} has bias {config.get('bias', True)} and activation {activation!r}; GTR's linear "
            "layer has no bias and no activation. Give the folder of a GTR."
        )
    if not (path / _WEIGHTS).is_file():
        pickled = sorted(file.name for file in path.glob("*.bin"))
        raise ValueError(
            f"{path} has no {_WEIGHTS}{f', but {pickled}' if pickled else ''}. Pickled weights are not "
            "read, because reading them runs code. Where they may be trusted, convert them with "
            "PyTorch: import torch, safetensors.torch; safetensors.torch.save_file(torch.load("
            f"'pytorch_model.bin', weights_only=True), '{_WEIGHTS}')."
        )
    tensors = safetensors.numpy.load_file(path / _WEIGHTS)
    shape = (config.get("out_features"), config.get("in_features"))
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != {_DENSE: shape}:
        raise ValueError(
            f"{path / _WEIGHTS} holds {found}, wanted {{'{_DENSE}': {shape}}}. Fetch the folder again."
        )
    return np.ascontiguousarray(tensors[_DENSE].T, np.float32)


def _encoder(path: pathlib.Path, t5: T5Config) -> dict[str, np.ndarray]:
    """Embedding and encoder by our names, `encoder/layers_3/attention/query/kernel`."""
    setting = t5_names.fid(t5)
    shapes = {
        name: shape
        for name, shape in t5_names.shapes(setting).items()
        if name.startswith(("encoder/", "token_embedder/"))
    }
    theirs = {name: names.their_name(name, setting) for name in shapes}
    wanted = {
        theirs[name]: tuple(reversed(shape)) if names.transposed(name) else shape
        for name, shape in shapes.items()
    }
    opened = huggingface.open_tensors(path, open_folder(path)).opened
    found = {name: store for name, store in opened.items() if name not in names.IGNORED}
    t5_names.check(path, wanted, {name: tuple(store.shape) for name, store in found.items()})

    def read(name: str) -> np.ndarray:
        store = found[theirs[name]]
        # Published ones are float16.
        return np.ascontiguousarray((store.T if names.transposed(name) else store)[...], np.float32)

    return {name: read(name) for name in shapes}
