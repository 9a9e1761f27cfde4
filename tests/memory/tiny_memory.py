"""A corpus and an encoder of a few numbers, and a build of them; also run as a script.

As a script, `python tiny_memory.py FOLDER die_at`: builds FOLDER, and kills itself with SIGKILL
(or asks itself to stop with SIGTERM) at a named point, or runs out of disk. `CALL:FILE` is the
system call `fsync` or `rename` of a file, before it is done; `after:FILE` is when it is there;
where FILE is in `versions`, passages are appended to a finished store.
"""

import dataclasses
import os
import resource
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from kill_at import kill_at

from glimmer_jax.memory import build, edit, encoding, shard
from glimmer_jax.memory.build import BuildConfig
from glimmer_jax.memory.encoding import MemoryEncoder
from glimmer_jax.memory.manifest import EncodeProgram, Identity, Layout
from glimmer_jax.runtime.preemption import STOP, StopRequested
from glimmer_jax.storage import folder

MAX_LENGTH = 12
EMB_DIM = 8


class TinyPassages:
    """Random tokens; ids that are not rows."""

    def __init__(self, count=23, longest=MAX_LENGTH, seed=0):
        rng = np.random.default_rng(seed)
        self.ids = (rng.permutation(1000)[:count] * 10**10).astype(np.int64)
        sizes = rng.integers(1, longest + 1, count)
        self.all_tokens = [rng.integers(2, 90, size).astype(np.int32) for size in sizes]

    def __len__(self):
        return len(self.ids)

    def lengths(self, rows):
        return np.array([len(self.all_tokens[row]) for row in rows], np.int32)

    def tokens(self, rows, length):
        out = np.zeros((len(rows), length), np.int32)
        for i, row in enumerate(rows):
            cut = self.all_tokens[row][:length]
            out[i, : len(cut)] = cut
        return out

    def title(self, row):
        return f"Title\n{row} \ud800 \u2028"

    def records(self, start, stop):
        return ({"title": self.title(row), "text": ""} for row in range(start, stop))


def encode_states(tokens):
    """Mixes each token with its row, as attention would; float32 `[n, P, D]`."""
    tokens = jnp.asarray(tokens)
    x = jnp.sin(tokens[..., None] * (1.0 + jnp.arange(EMB_DIM, dtype=jnp.float32))[None, None])
    real = (tokens > 0)[..., None]
    return x - jnp.sum(x * real, axis=1, keepdims=True)


@jax.jit
def encode(tokens):
    return encoding.encode_states("bf16", encode_states(tokens))


IDENTITY = Identity("sha256:e1", "sha256:v1", "bf16", EMB_DIM, MAX_LENGTH)
LAYOUT = Layout(shard_passages=6, chunk_tokens=4)
PROGRAM = EncodeProgram(4, (4, 8, MAX_LENGTH), "float32", None, "cpu", jax.__version__)


def encoder(encode=encode, devices=1, codebooks=None, **changes):
    """The tiny encoder, with changes by name of a field of its identity or program."""

    def changed(settings):
        names = {field.name for field in dataclasses.fields(settings)}
        mine = {name: changes.pop(name) for name in names & changes.keys()}
        return dataclasses.replace(settings, **mine)

    made = MemoryEncoder(encode, changed(IDENTITY), changed(PROGRAM), devices, codebooks)
    assert not changes, changes
    return made


def build_tiny(path, passages=None, **kwargs):
    settings = dict(
        passages=passages if passages is not None else TinyPassages(),
        passages_fingerprint="sha256:p1",
        reference=encode_states,
    )
    config = {"layout": LAYOUT}
    for name in ("layout", "accept_other_program", "builders"):
        if name in kwargs:
            config[name] = kwargs.pop(name)
    settings["config"] = BuildConfig(**config)
    for name in ("encode", "devices", "codebooks", *vars(IDENTITY), *vars(PROGRAM)):
        if name in kwargs:
            settings.setdefault("changes", {})[name] = kwargs.pop(name)
    changes = settings.pop("changes", {})
    return build.build_memory(encoder(**changes), path=path, **settings | kwargs)


def part(rows):
    """Some passages of the tiny corpus as a corpus of its own."""
    whole, some = TinyPassages(), TinyPassages(count=0)
    some.ids = whole.ids[rows]
    some.all_tokens = [whole.all_tokens[row] for row in rows]
    some.title = lambda row: whole.title(rows[row])
    return some


def append_tiny(path, passages, fingerprint="sha256:p2", **kwargs):
    kwargs = {"config": BuildConfig(LAYOUT), **kwargs}
    return edit.append(encoder(), passages, path, passages_fingerprint=fingerprint, **kwargs)


def _die_at_file(point, file):
    """Dies at the first write of `file`: before its fsync or rename, or when it is there."""
    write_file, write_arrays = folder.write_file, shard.write_arrays

    def dying(write, kvstore, path, *args, **kwargs):
        mine = path.endswith(file)
        if mine and point != "after":
            kill_at(point)
        done = write(kvstore, *args, **kwargs)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    folder.write_file = lambda kvstore, key, data: dying(
        write_file, kvstore, kvstore.path + key, key, data
    )
    shard.write_arrays = lambda kvstore, *args, **kwargs: dying(
        write_arrays, kvstore, f"{kvstore.path}arrays", *args, **kwargs
    )


def _main(path, die_at):
    STOP.install()
    calls = 0

    def dying_encode(tokens):
        nonlocal calls
        calls += 1
        # The third shard of four, after the sample for the error and two shards.
        if die_at == "encode" and calls == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        if die_at == "sigterm" and calls == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(tokens)

    if die_at == "disk_full":
        # As if the disk ended: no file may grow beyond this many bytes.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
    point, _, file = die_at.partition(":")
    if "versions" in file:
        build_tiny(path, part(range(9)))
    if file:
        _die_at_file(point, file)
    try:
        if "versions" in file:
            append_tiny(path, TinyPassages())
        else:
            build_tiny(path, encode=dying_encode)
    except StopRequested:
        sys.exit(42)
    except OSError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    _main(*sys.argv[1:])
