"""Errors of weight files: one boundary between the parsers of a file format and its users."""

import contextlib
import struct
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np

# Dtypes of weights. Integers, complex numbers and objects are not converted.
WEIGHT_DTYPES = ("float32", "float16", "bfloat16", "float64")
# Exceptions that parsers raise on hostile or damaged input. Errors of the storage (OSError) pass.
_PARSER_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    SyntaxError,
    struct.error,
    msgpack.UnpackException,
)


class InvalidWeights(ValueError):
    """A file of weights that cannot be used; the message names the file and the problem."""


@contextlib.contextmanager
def parsing(file: Any, kind: str) -> Iterator[None]:
    """Turns whatever a parser raises about a file's content into `InvalidWeights`.

    Args:
      file: the file or folder, for the message.
      kind: the format, for the message.
    """
    try:
        yield
    except InvalidWeights:
        raise
    except _PARSER_ERRORS as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InvalidWeights(
            f"{file} is not a valid {kind} file, or is damaged ({type(error).__name__}: {reason}). "
            "Download or write it again."
        ) from error


def check_dtype(file: Any, name: str, dtype: Any) -> None:
    """Raises InvalidWeights if an array is not of floating-point numbers."""
    if str(dtype) not in WEIGHT_DTYPES:
        raise InvalidWeights(
            f"{file} holds {name} as {dtype}. Weights must be one of {', '.join(WEIGHT_DTYPES)}: save "
            "the model in one of these types."
        )


def check_finite(name: str, array: np.ndarray) -> np.ndarray:
    """The array, if all of its numbers are finite.

    Raises:
      InvalidWeights: it holds NaN or infinities; the message names the parameter.
    """
    finite = np.isfinite(array)
    if not finite.all():
        raise InvalidWeights(
            f"Parameter {name} holds {finite.size - np.count_nonzero(finite)} numbers that are NaN or "
            f"infinite, of {finite.size}. Training diverged, or float32 overflowed when the weights "
            "were converted. Use another checkpoint."
        )
    return array
