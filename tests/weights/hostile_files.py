"""Seeded hostile changes to weight files: their structure contradicts itself or their format.

    for description in hostile_files.attacks("safetensors", folder, seed=0, count=20):
        ...  # the folder at `folder` is hostile here

Numbers of weights are left alone: these formats have no checksums.
"""

import json
import pathlib
import random
import struct

import msgpack

from tests import damage

DEEP = 100_000
SHAPES = ([-1, 4], [2**40, 2**40], [0, 16], [1.5, 16], [[16], 16], [True, 16], None, "16", [1] * 99)
DTYPES = ("I32", "I64", "C64", "BOOL", "F8_E4M3", "", 7, None, ["F32"])
NUMPY_DTYPES = ("int32", "complex64", "object", "O", "f4,f4", "<U4", "((", "V8", "float32" * 99)
NUMBERS = (-1, 0, 2**31, 2**63, 10**30, 1.5, "16", None, True, [], {}, 3_000_000)
PATHS = ("../x", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "\0", 7, None, [], "x" * 5000)
JSON_TEXTS = ("{}", *damage.JSON_TEXTS)


def attacks(kind, folder, *, seed, count):
    """Applies one hostile change after the other, and yields its description while in effect."""
    draw = random.Random(f"{kind} {seed}")
    intact = damage.read_files(folder)
    for number in range(count):
        change = CHANGES[kind][number % len(CHANGES[kind])]
        try:
            detail = change(pathlib.Path(folder), draw)
            yield f"{kind} {number} of seed {seed}: {change.__name__} {detail!r:.120}"
        finally:
            damage._restore(folder, intact)


def split(path):
    """The header and the data of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def safetensors_of(folder, draw):
    return draw.choice(sorted(folder.glob("*.safetensors")))


def entry(folder, draw, key, values):
    """Replaces a field of one tensor's entry."""
    path = safetensors_of(folder, draw)
    header, data = split(path)
    name = draw.choice(sorted(header.keys() - {"__metadata__"}))
    header[name][key] = draw.choice(values)
    join(path, header, data)
    return name, header[name]


def tensor_shape(folder, draw):
    return entry(folder, draw, "shape", SHAPES)


def tensor_dtype(folder, draw):
    return entry(folder, draw, "dtype", DTYPES)


def tensor_offsets(folder, draw):
    big = 2**63
    values = (
        [-64, 0],
        [0, big],
        [big, big + 64],
        [64, 0],
        [0, 0],
        [0],
        None,
        [1.0, 2.0],
        ["0", "4"],
    )
    return entry(folder, draw, "data_offsets", values)


def enormous_tensor(folder, draw):
    path = safetensors_of(folder, draw)
    header, data = split(path)
    name = max(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    begin, _ = header[name]["data_offsets"]
    size = draw.choice([2**61, 2**70])
    header[name] |= {"dtype": "F32", "shape": [size], "data_offsets": [begin, begin + 4 * size]}
    join(path, header, data)
    return name, size


def tensors_overlap(folder, draw):
    path = safetensors_of(folder, draw)
    header, data = split(path)
    names = sorted(header.keys() - {"__metadata__"})
    first, second = draw.sample(names, 2)
    header[first] = header[second]
    join(path, header, data)
    return first, second


def tensor_entry(folder, draw):
    path = safetensors_of(folder, draw)
    header, data = split(path)
    name = draw.choice(sorted(header.keys() - {"__metadata__"}))
    header[name] = draw.choice([None, [], 7, "x", {}])
    join(path, header, data)
    return name, header[name]


def repeated_tensor(folder, draw):
    path = safetensors_of(folder, draw)
    header, data = split(path)
    name = draw.choice(sorted(header.keys() - {"__metadata__"}))
    again = json.dumps({name: header[name]})[1:-1]
    join(path, f"{json.dumps(header)[:-1]}, {again}}}".encode(), data)
    return name


def header_text(folder, draw):
    path = safetensors_of(folder, draw)
    text = draw.choice(JSON_TEXTS)
    join(path, text.encode("utf-8", "surrogatepass"), split(path)[1])
    return text[:20]


def header_size(folder, draw):
    path = safetensors_of(folder, draw)
    size = draw.choice([0, 1, 3, 99_999_999, 2**40, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    return size


def file_length(folder, draw):
    path = safetensors_of(folder, draw)
    data = path.read_bytes()
    length = draw.choice([0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, len(data) + 1])
    path.write_bytes((data + b"\0")[:length])
    return length


def config_value(folder, draw):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    names = [n for n, x in config.items() if type(x) is int and not n.endswith("token_id")]
    name = draw.choice(sorted(names))
    # transformers takes its default for null.
    config[name] = draw.choice([number for number in NUMBERS if number is not None])
    path.write_text(json.dumps(config))
    return name, config[name]


def config_text(folder, draw):
    text = draw.choice([text for text in JSON_TEXTS if text])
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    return text[:20]


def index_path(folder, draw):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = draw.choice(sorted(index["weight_map"]))
    index["weight_map"][name] = draw.choice(PATHS)
    path.write_text(json.dumps(index))
    return index["weight_map"][name]


def index_text(folder, draw):
    text = draw.choice([text for text in JSON_TEXTS if text])
    path = folder / "model.safetensors.index.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return text[:20]


def tensor_in_two_files(folder, draw):
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    (header, data), (other, _) = split(first), split(second)
    name = draw.choice(sorted(other.keys() - {"__metadata__"}))
    begin, end = other[name]["data_offsets"]
    header[name] = {**other[name], "data_offsets": [len(data), len(data) + end - begin]}
    join(first, header, data + bytes(end - begin))
    return name


def array(shape, dtype, data=b""):
    """An array as Flax packs it."""
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


def some_leaf(tree, draw):
    """(map, key) of a leaf of a nested dict."""
    key = draw.choice(sorted(tree))
    inner = tree[key]
    return some_leaf(inner, draw) if isinstance(inner, dict) and inner else (tree, key)


def msgpack_of(folder):
    (path,) = [p for p in (folder / "flax_model.msgpack", folder / "checkpoint") if p.is_file()]
    content = msgpack.unpackb(path.read_bytes(), ext_hook=msgpack.ExtType)
    root = content["optimizer"]["target"] if path.name == "checkpoint" else content
    return path, content, root


def packed_leaf(folder, draw):
    path, content, root = msgpack_of(folder)
    tree, key = some_leaf(root, draw)
    tree[key] = draw.choice(
        [
            *(array(shape, "float32") for shape in SHAPES),
            *(array([4, 4], dtype, bytes(64)) for dtype in NUMPY_DTYPES),
            *(None, 7, "x", b"x", [], {}),
            *(msgpack.ExtType(code, b"x") for code in (0, 1, 2, 3, 99)),
            {"__msgpack_chunked_array__": True, "shape": [2**40], "chunks": {}},
            {"driver": "zarr", "kvstore": {"driver": "file", "path": draw.choice(PATHS)}},
            {"driver": "zarr"},
        ]
    )
    path.write_bytes(msgpack.packb(content))
    return key, tree[key]


def packed_key(folder, draw):
    path, content, root = msgpack_of(folder)
    tree, key = some_leaf(root, draw)
    tree[draw.choice([7, b"x", "", "..", "a/b", f"{key}/"])] = tree.pop(key)
    path.write_bytes(msgpack.packb(content))
    return key


def packed_bytes(folder, draw):
    path, content, _ = msgpack_of(folder)
    packed = path.read_bytes()
    data = draw.choice(
        [
            b"",
            b"\xc1",
            b"\x81\xa1a" * DEEP,
            b"\x91" * DEEP,
            b"\xdf\xff\xff\xff\xff",
            b"\xdd\xff\xff\xff\xff",
            b"\xc9\xff\xff\xff\xff\x01",
            packed[: draw.randrange(1, min(len(packed), 400))],
            msgpack.packb([content]),
            msgpack.packb(7),
        ]
    )
    path.write_bytes(data)
    return data[:20]


def repeated_key(folder, draw):
    path, _, root = msgpack_of(folder)
    name, value = draw.choice(sorted(root.items(), key=lambda item: item[0]))
    again = msgpack.packb(name) + msgpack.packb(value)
    data = bytes([0x80 + len(root) + 1]) + msgpack.packb(root)[1:] + again
    if path.name == "checkpoint":
        data = b"\x81\xa9optimizer\x81\xa6target" + data
    path.write_bytes(data)
    return name


def zarr_metadata(folder, draw):
    path = draw.choice(sorted(folder.rglob(".zarray")))
    value = json.loads(path.read_text())
    key = draw.choice(["shape", "chunks", "dtype", "compressor", "order", "zarr_format"])
    choices = {
        "shape": SHAPES,
        "chunks": (*SHAPES, [2**20, 2**20]),
        "dtype": ("<i4", "<c8", "|O", "|V8", "x", None, [["a", "<f4"]]),
        "compressor": ("x", {"id": "x"}, {"id": 7}),
        "order": ("x", None, 7),
        "zarr_format": (1, 99, None),
    }
    value[key] = draw.choice(choices[key])
    path.write_text(json.dumps(value))
    return path.parent.name, key, value[key]


def zarr_text(folder, draw):
    path = draw.choice(sorted(folder.rglob(".zarray")))
    text = draw.choice(JSON_TEXTS)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path.parent.name, text[:20]


def orbax_metadata(folder, draw):
    path = next(folder.rglob("_METADATA"))
    value = json.loads(path.read_text())
    leaves = value["tree_metadata"]
    name = draw.choice(sorted(leaves))
    change = draw.choice(["key", "leaf", "twice", "tree", "zarr3"])
    if change == "key":
        leaves[name]["key_metadata"][-1]["key"] = draw.choice(PATHS)
    elif change == "leaf":
        leaves[name] = draw.choice([None, [], 7, "x", {}, {"key_metadata": 7}])
    elif change == "twice":
        leaves["again"] = leaves[name]
    elif change == "tree":
        value["tree_metadata"] = draw.choice([None, [], 7, {}])
    else:
        value["use_zarr3"] = draw.choice([True, 7, "x", []])
    path.write_text(json.dumps(value))
    return change, name


def orbax_text(folder, draw):
    text = draw.choice([text for text in JSON_TEXTS if text])
    next(folder.rglob("_METADATA")).write_bytes(text.encode("utf-8", "surrogatepass"))
    return text[:20]


def ocdbt_manifest(folder, draw):
    """The root of the B-tree that holds all arrays; it has a checksum."""
    path = folder / "state" / "manifest.ocdbt"
    data = bytearray(path.read_bytes())
    change = draw.choice(["flip", "truncate", "extend", "empty", "zeros"])
    if change == "flip":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    contents = {
        "truncate": data[: draw.randrange(len(data))],
        "extend": data + b"\0",
        "empty": b"",
        "zeros": bytes(len(data)),
    }
    path.write_bytes(contents.get(change, data))
    return change, str(path.relative_to(folder))


def ocdbt_data(folder, draw):
    """A file of nodes and chunks; numbers in it have no checksum, so that no bit is flipped."""
    path = draw.choice(sorted((folder / "state" / "d").iterdir()))
    other = draw.choice(sorted(folder.glob("state/ocdbt.process_*/d/*")))
    change = draw.choice(["truncate", "delete", "replace"])
    if change == "truncate":
        path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    elif change == "delete":
        path.unlink()
    else:
        path.write_bytes(other.read_bytes())
    return change, str(path.relative_to(folder))


CHANGES = {
    "safetensors": [
        tensor_shape,
        tensor_dtype,
        tensor_offsets,
        enormous_tensor,
        tensors_overlap,
        tensor_entry,
        repeated_tensor,
        header_text,
        header_size,
        file_length,
        config_value,
        config_text,
    ],
    "index": [index_path, index_text, tensor_in_two_files],
    "msgpack": [packed_leaf, packed_key, packed_bytes, repeated_key],
    "t5x": [packed_leaf, packed_key, packed_bytes, repeated_key, zarr_metadata, zarr_text],
    "orbax": [orbax_metadata, orbax_text, zarr_metadata, zarr_text],
    "ocdbt": [orbax_metadata, orbax_text, ocdbt_manifest, ocdbt_data],
}
