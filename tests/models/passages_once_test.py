"""What decoding does with the passages' keys and values, read from its program: before XLA and after.

For the plain decoder and FiDO's, scanned and looped, greedy, with beams and with candidates. They

* exist once for each question, for kept passages and in layers that attend only;
* are computed before the token loop, and not again in it;
* are never there for each beam.

Both are read, because each hides something: XLA merges what is computed twice and moves out of a
loop what does not change in it, on which nobody should rely, and it may copy what the trace holds
once.

Sizes are chosen so that the number of an array's elements tells what it is: only keys and values
of the passages, and what is made of them, are multiples of `once`.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

import jax
import jax.extend.core
import numpy as np
import pytest

from glimmer_jax.models.glimmer import GlimmerConfig
from glimmer_jax.models.model import DecodeConfig, GlimmerModel
from tests.models import tiny

B, W, Q, P, T = 5, 3, 4, 9, 7
K, KEPT = 3, 2
S = KEPT * (Q + P)
PLAIN = dataclasses.replace(tiny.T5, num_encoder_layers=1, num_decoder_layers=4, decoder_head_dim=7)
FIDO = dataclasses.replace(PLAIN, cross_attention_period=2, decoder_kv_heads=2)
SEARCHES = {"greedy": DecodeConfig(), "beam": DecodeConfig(beams=W), "candidates": DecodeConfig()}


class Array(NamedTuple):
    """One that a program computes."""

    by: str  # the operation
    size: int  # elements
    in_loop: bool  # in the token loop
    times: int  # for how many layers, where it stands in a loop over layers


class Program(NamedTuple):
    arrays: list[Array]
    entering: list[int]  # sizes of what enters the token loop


@functools.cache
def lowered(t5, search):
    """The trace of a prediction."""
    model = GlimmerModel(GlimmerConfig(t5, rerank_layers=1, num_kept=KEPT), decode=SEARCHES[search])
    batch = {
        "question_tokens": np.ones((B, Q), np.int32),
        "passage_tokens": np.ones((B, K, P), np.int32),
        "decoder_input_tokens": np.zeros((B, T), np.int32),
    }
    if search == "candidates":
        batch["candidate_tokens"] = np.ones((B, W, T), np.int32)
    return jax.jit(model.predict_batch).trace(model.abstract_variables()[0], batch)


def traced(t5, search):
    """The program as JAX hands it to XLA: tokens are the only `while`, layers are scans."""
    found = Program([], [])

    def walk(jaxpr, in_loop, times):
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            for var in eqn.outvars:
                found.arrays.append(Array(name, math.prod(var.aval.shape), in_loop, times))
            if name == "while":
                found.entering.extend(math.prod(var.aval.shape) for var in eqn.invars)
            inner_times = times * (eqn.params["length"] if name == "scan" else 1)
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                walk(inner, in_loop or name == "while", inner_times)

    walk(lowered(t5, search).jaxpr.jaxpr, False, 1)
    return found


# Name, type, operation and the rest of an instruction of XLA's text.
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)")


def sizes(text):
    """Elements of every array in a type."""
    shapes = re.findall(r"\b[a-z]+\d+(?:\[([\d,]*)\])", text)
    return [math.prod(int(d) for d in shape.split(",") if d) for shape in shapes]


def compiled(t5, search):
    """The program that XLA's compiler has made: tokens are the `while` that carries them."""
    text = lowered(t5, search).lower().compile(compiler_options=tiny.QUICK).as_text()
    computations, entry, lines = {}, None, None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif (one := INSTRUCTION.match(line)) and lines is not None:
            lines.append(one.groups())
    carried = f"s32[{B},{W},{T}]" if search != "greedy" else f"s32[{B},{T}]"
    found = Program([], [])

    def walk(name, in_loop, times):
        for _, kind, operation, rest in computations[name]:
            found.arrays.extend(Array(operation, size, in_loop, times) for size in sizes(kind))
            is_tokens = operation == "while" and carried in kind
            if is_tokens and not in_loop:
                found.entering.extend(sizes(kind))
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            inner_times = times * (int(trips[1]) if trips else 1)
            for inner in sorted(set(re.findall(r"[\w.-]+", rest)) & computations.keys()):
                walk(inner, in_loop or is_tokens, inner_times)

    walk(entry, False, 1)
    return found


DECODERS = {
    f"{name}-{form}": dataclasses.replace(t5, scan_layers=form == "scanned")
    for name, t5 in (("plain", PLAIN), ("fido", FIDO))
    for form in ("scanned", "looped")
}


# Compiled programs take seconds each; the greedy one is that of one beam.
CASES = [
    *((traced, search) for search in SEARCHES),
    (compiled, "beam"),
    pytest.param(compiled, "greedy", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("source, search", CASES)
@pytest.mark.parametrize("decoder", DECODERS)
def test_passage_keys_and_values_are_computed_once_before_the_loop(source, decoder, search):
    t5 = DECODERS[decoder]
    attending = sum(t5.attends(i) for i in range(t5.num_decoder_layers))
    assert attending == (2 if "fido" in decoder else 4)
    once = B * S * t5.decoder_sizes.num_kv_heads * t5.decoder_sizes.head_dim
    needed = 2 * attending * once  # keys and values
    arrays, entering = source(t5, search)
    products = [x for x in arrays if x.by in ("dot_general", "dot", "custom-call")]

    # Computed once for each question and attending layer, ...
    made = [x for x in products if not x.size % once]
    assert sum(x.size * x.times for x in made if not x.in_loop) == needed
    # ... never again for a token, ...
    assert not [x for x in made if x.in_loop]
    # ... and that is what the token loop reads: nothing for layers that do not attend, ...
    assert sum(size for size in entering if not size % once) == needed
    # ... and nowhere is there one for each beam.
    if search != "greedy":
        assert not [x for x in arrays if not x.size % (W * once)]

    # The search sees what it looks for: the loop attends, with a product over the passages' S.
    heads = t5.decoder_sizes.num_heads
    weights = B * heads * S * (1 if search == "greedy" else W)
    assert any(x.in_loop and x.size == weights for x in products)
