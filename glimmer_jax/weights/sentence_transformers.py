"""GTR in the form of sentence-transformers: a folder of four modules.

    modules.json                            names and folders of the modules
    config.json, model.safetensors          0: the T5 encoder, in the form of Hugging Face
    spiece.model                            its vocabulary
    sentence_bert_config.json               maximum number of tokens
    config_sentence_transformers.json       prompts; they must be empty
    1_Pooling/config.json                   1: mean over tokens
    2_Dense/config.json, model.safetensors  2: linear layer
                                            3: normalisation, without files

Published folders may hold the linear layer as `2_Dense/pytorch_model.bin`, a pickle, which is not read.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import flax.traverse_util
import numpy as np

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.t5 import T5Config
from glimmer_jax.storage.folder import open_folder
from glimmer_jax.storage.json_lines import parse_line
from glimmer_jax.weights import huggingface_names as names
from glimmer_jax.weights import safetensors_file, t5_names
from glimmer_jax.weights.file_errors import InvalidWeights, check_finite, parsing
from glimmer_jax.weights.huggingface_files import open_tensors, with_one_embedding
from glimmer_jax.weights.lazy_arrays import read

MODULES = ["Transformer", "Pooling", "Dense", "Normalize"]
_VOCABULARY, _WEIGHTS = "spiece.model", "model.safetensors"
_TEXTS, _PROMPTS = "sentence_bert_config.json", "config_sentence_transformers.json"
_DENSE = "linear.weight"
_DEFAULT_LENGTH = 512


@dataclasses.dataclass(frozen=True)
class LoadedGtr:
    """The content of a folder."""

    params: dict[str, Any]  # of `models.gtr.Gtr` with unrolled layers, float32 numpy
    t5: T5Config
    vector_dim: int  # E
    max_length: int  # tokens of a text, including the end token
    vocabulary: bytes  # a SentencePiece model
    what: str  # a description for messages

    @property
    def fingerprint(self) -> str:
        """`sha256:…` of the parameters and the settings they are used with."""
        digest = hashlib.sha256(json.dumps(self.t5.semantics(), sort_keys=True).encode())
        for name, leaf in sorted(flax.traverse_util.flatten_dict(self.params, sep="/").items()):
            digest.update(f"{name} {leaf.shape}\n".encode() + leaf.tobytes())
        return f"sha256:{digest.hexdigest()}"

    @property
    def vocabulary_fingerprint(self) -> str:
        """`sha256:…` of the SentencePiece model."""
        return f"sha256:{hashlib.sha256(self.vocabulary).hexdigest()}"


def load_gtr(path: Any) -> LoadedGtr:
    """Reads a folder into host memory.

    Raises:
      ValueError: files are missing, damaged or pickled, the modules or their settings are not GTR's, or
        parameters are missing, extra, misshapen or not finite.
    """
    path = pathlib.Path(path)
    root, pooling, dense = (path / place for place in _modules(path))
    _check_pooling(pooling / "config.json")
    max_length = _text_settings(root)
    kernel = _dense_kernel(dense)
    config = _read_json(root / "config.json")
    t5 = names.read_config(root, config, tie_output=False)
    if kernel.shape[0] != t5.emb_dim:
        raise InvalidWeights(
            f"{dense} expects {kernel.shape[0]} channels, but the encoder in {root} has {t5.emb_dim}. "
            "Download the complete folder again."
        )
    flat = {**_encoder(root, t5), "projection/kernel": kernel}
    if not (root / _VOCABULARY).is_file():
        raise InvalidWeights(
            f"{root} has no {_VOCABULARY}, the SentencePiece model of its vocabulary. Copy T5's into it; "
            "tokenizer.json is not read."
        )
    count = sum(leaf.size for leaf in flat.values())
    return LoadedGtr(
        flax.traverse_util.unflatten_dict(flat, sep="/"),
        t5,
        int(kernel.shape[1]),
        max_length,
        (root / _VOCABULARY).read_bytes(),
        f"a GTR in {path}: {count:,} parameters, {t5.num_encoder_layers} layers of width "
        f"{t5.emb_dim}, vectors of {kernel.shape[1]}",
    )


def _modules(path: pathlib.Path) -> list[str]:
    """Folders of the encoder, the pooling and the linear layer, relative to `path`."""
    if not (path / "modules.json").is_file():
        raise InvalidWeights(
            f"{path} has no modules.json: it is not a folder of sentence-transformers. Give the complete "
            "folder of a GTR, such as gtr-t5-base."
        )
    file = path / "modules.json"
    with parsing(file, "JSON"):
        modules = json.loads(file.read_bytes())
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        folders = [str(module["path"]) for module in modules]
        if any(pathlib.PurePath(name).is_absolute() or ".." in name for name in folders):
            raise ValueError(f"it names folders outside of its own: {folders}")
    if kinds != MODULES:
        raise InvalidWeights(
            f"{path} holds the modules {kinds}, expected {MODULES}. Give the folder of a GTR, such as "
            "gtr-t5-base."
        )
    return folders[:3]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise InvalidWeights(f"{path} is missing. Download the complete folder again.")
    with parsing(path, "JSON"):
        return parse_line(path.read_bytes(), str(path))


def _text_settings(root: pathlib.Path) -> int:
    """The maximum number of tokens. Raises if texts would be changed before they are tokenised."""
    settings = _read_json(root / _TEXTS) if (root / _TEXTS).is_file() else {}
    if settings.get("do_lower_case"):
        raise InvalidWeights(
            f"{root / _TEXTS} has do_lower_case true, which is not supported. GTR keeps the case."
        )
    max_length = settings.get("max_seq_length") or _DEFAULT_LENGTH
    if type(max_length) is not int or not 1 <= max_length <= 1 << 20:
        raise InvalidWeights(f"{root / _TEXTS} has max_seq_length {max_length!r:.40}.")
    prompts = _read_json(root / _PROMPTS) if (root / _PROMPTS).is_file() else {}
    if prompts.get("default_prompt_name") or _texts(prompts.get("prompts")):
        raise InvalidWeights(
            f"{root / _PROMPTS} prepends prompts to texts, which is not supported. GTR has no prompts."
        )
    return max_length


def _texts(prompts: Any) -> bool:
    """Whether any prompt is not empty."""
    return any(prompts.values()) if isinstance(prompts, dict) else bool(prompts)


def _check_pooling(path: pathlib.Path) -> None:
    config = _read_json(path)
    modes = {name for name, value in config.items() if name.startswith("pooling_mode_") and value}
    # Newer folders have one name instead of many flags.
    names = config.get("pooling_mode") or []
    modes |= {
        f"pooling_mode_{name}_tokens" for name in (names if isinstance(names, list) else [names])
    }
    if modes != {"pooling_mode_mean_tokens"}:
        raise InvalidWeights(
            f"{path} has {sorted(modes)}, expected pooling_mode_mean_tokens alone. Give the folder of a "
            "GTR."
        )


def _dense_kernel(path: pathlib.Path) -> np.ndarray:
    config = _read_json(path / "config.json")
    activation = str(config.get("activation_function", "")).rpartition(".")[2]
    if config.get("bias", True) or activation != "Identity":
        raise InvalidWeights(
            f"{path}/config.json has bias {config.get('bias', True)} and activation {activation!r}. "
            "GTR's linear layer has no bias and activation Identity. Give the folder of a GTR."
        )
    file = path / _WEIGHTS
    if not file.is_file():
        pickled = sorted(child.name for child in path.glob("*.bin"))
        raise InvalidWeights(
            f"{path} has no {_WEIGHTS}{f', but {pickled}' if pickled else ''}. Pickled weights are not "
            "read, because reading them runs code. If you trust them, convert them with PyTorch: "
            "import torch, safetensors.torch; safetensors.torch.save_file(torch.load("
            f"'pytorch_model.bin', weights_only=True), '{_WEIGHTS}')."
        )
    tensors = safetensors_file.read(str(file), file.read_bytes())
    expected = {_DENSE: (config.get("out_features"), config.get("in_features"))}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != expected:
        raise InvalidWeights(f"{file} holds {shapes}, expected {expected}. Download it again.")
    return check_finite(_DENSE, np.ascontiguousarray(tensors[_DENSE].T, np.float32))


def _encoder(path: pathlib.Path, t5: T5Config) -> dict[str, np.ndarray]:
    """Embedding and encoder by our names, `encoder/layers_3/attention/query/kernel`."""
    model = GlimmerConfig(t5)
    kvstore = open_folder(path)
    stores = with_one_embedding(path, {}, open_tensors(path, kvstore).opened)
    t5_names.check_layers(path, model, len(stores) + t5.num_decoder_layers)
    shapes = {
        name: shape
        for name, shape in t5_names.shapes(model).items()
        if name.startswith(("encoder/", "token_embedder/"))
    }
    theirs = {name: names.their_name(name, model) for name in shapes}
    expected = {
        theirs[name]: tuple(reversed(shape)) if names.transposed(name) else shape
        for name, shape in shapes.items()
    }
    t5_names.check(path, expected, {name: tuple(store.shape) for name, store in stores.items()})

    def load(name: str) -> np.ndarray:
        array = read(name, stores[theirs[name]])
        # Published parameters are float16.
        return np.ascontiguousarray(array.T if names.transposed(name) else array, np.float32)

    return {name: load(name) for name in shapes}
