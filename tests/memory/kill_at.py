"""Kills at a system call: the kernel kills this process when it makes one, before it is executed.

What writes files is not Python, so no patch could stand between its write, its fsync and its
rename. The kernel's own filter can: as `kill -9`, it cannot be caught and leaves no time to tidy
up.
"""

import ctypes
import os
import platform
import struct

# Numbers of the calls by machine; the last is that of seccomp itself.
_CALLS = {
    "x86_64": {"fsync": (74, 75), "rename": (82, 264, 316), "seccomp": (317,)},
    "aarch64": {"fsync": (82, 83), "rename": (38, 276), "seccomp": (277,)},
}
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _KILL_PROCESS = 0x7FFF0000, 0x80000000
_NO_NEW_PRIVILEGES, _SET_FILTER, _ALL_THREADS = 38, 1, 1


def kill_at(call: str) -> None:
    """From now on the first `fsync` or `rename` of any thread ends this process."""
    numbers = _CALLS[platform.machine()]
    steps = [(_LOAD, 0, 0, 0)]
    for i, number in enumerate(numbers[call]):
        steps.append((_JUMP_IF_EQUAL, len(numbers[call]) - i, 0, number))
    steps += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _KILL_PROCESS)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.syscall(
        *numbers["seccomp"], _SET_FILTER, _ALL_THREADS, program
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
