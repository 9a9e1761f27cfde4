"""Files with a checksum per block, compared when a block is first read.

A passages folder may have 30 GB, which is too much to hash at every start, and any block of it may be
damaged. So each block is hashed once, before its first byte is used; a bitmap holds which were. The size
is compared at every read, because reading behind the end of a mapped file ends the process (SIGBUS).
"""

import hashlib
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from glimmer_jax.storage.errors import DamagedData

BLOCK_BYTES = 2**20
DIGEST_BYTES = 8  # of BLAKE2b, for each block
NPY_HEADER_BYTES = 128


def file_checksums(path: Path) -> dict[str, Any]:
    """`{"bytes": int, "sha256": hex of the file, "blocks": hex of its blocks' digests}`."""
    whole, blocks, size = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        while data := file.read(BLOCK_BYTES):
            size += len(data)
            whole.update(data)
            blocks.append(_digest(data).hex())
    return {"bytes": size, "sha256": whole.hexdigest(), "blocks": "".join(blocks)}


def num_blocks(size: int) -> int:
    """Blocks of a file of `size` bytes."""
    return -(-size // BLOCK_BYTES)


def npy_header(dtype: np.dtype, length: int) -> bytes:
    """The header of a .npy file of one dimension, `NPY_HEADER_BYTES` long."""
    fields = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({length},), }}"
    text = fields.ljust(NPY_HEADER_BYTES - 11).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def npy_bytes(dtype: np.dtype, length: int) -> int:
    """Size of a .npy file of one dimension."""
    return NPY_HEADER_BYTES + length * dtype.itemsize


class CheckedFile:
    """A memory-mapped file whose blocks are compared with their checksums before they are used."""

    def __init__(self, path: Path, blocks: str):
        """Maps a file that is not empty.

        Args:
          path: a regular file.
          blocks: digests of its blocks in hexadecimal, `num_blocks` of them.
        """
        self.path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.bytes: np.ndarray = np.frombuffer(self._map, np.uint8)
        self._digests = bytes.fromhex(blocks)
        self._verified = np.zeros(num_blocks(len(self.bytes)), bool)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) as uint8, without a copy. Raises DamagedData for a damaged block."""
        self._check_size()
        first, last = start // BLOCK_BYTES, num_blocks(stop)
        if not self._verified[first:last].all():
            self.verify(np.arange(first, last))
        return self.bytes[start:stop]

    def verify(self, blocks: np.ndarray | None = None) -> None:
        """Compares the given blocks, or all, unless that was done. Raises DamagedData for damage."""
        self._check_size()
        if blocks is None:
            blocks = np.arange(len(self._verified))
        for block in np.unique(blocks[~self._verified[blocks]]).tolist():
            start = block * BLOCK_BYTES
            data = self.bytes[start : start + BLOCK_BYTES]
            expected = self._digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]
            if (digest := _digest(data)) != expected:
                raise DamagedData(
                    f"{self.path} is damaged in bytes {start} to {start + len(data)}: expected "
                    f"checksum {expected.hex()}, got {digest.hex()}. Delete the folder and copy it "
                    "again, or rerun --run_mode=passages."
                )
            self._verified[block] = True

    def _check_size(self) -> None:
        if (size := self._map.size()) < len(self.bytes):
            raise DamagedData(
                f"{self.path} was truncated from {len(self.bytes)} to {size} bytes while it was open. "
                "Copy the folder again, and replace files instead of changing them."
            )


class CheckedArray:
    """A .npy file of one dimension, read through `CheckedFile`."""

    def __init__(self, file: CheckedFile, dtype: np.dtype, length: int):
        """Checks the header: it must be the one that a file of this dtype and length has.

        Raises DamagedData for any other header, or a damaged first block.
        """
        if file.read(0, NPY_HEADER_BYTES).tobytes() != npy_header(dtype, length):
            raise DamagedData(
                f"{file.path}: expected the .npy header of {length} values of {dtype}, found another. "
                "Delete the folder and copy it again, or rerun --run_mode=passages."
            )
        self._file = file
        self._values = file.bytes[NPY_HEADER_BYTES:].view(dtype)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The values at indices, any shape, as a copy. Raises DamagedData for a damaged block."""
        # Item sizes divide the header and the block, so a value lies in one block.
        first_bytes = NPY_HEADER_BYTES + indices * self._values.itemsize
        self._file.verify((first_bytes // BLOCK_BYTES).ravel())
        return np.asarray(self._values[indices])

    def slice(self, start: int, stop: int) -> np.ndarray:
        """The values [start, stop), without a copy. Raises DamagedData for a damaged block."""
        size = self._values.itemsize
        self._file.read(NPY_HEADER_BYTES + start * size, NPY_HEADER_BYTES + stop * size)
        return np.asarray(self._values[start:stop])


def _digest(data: Any) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
