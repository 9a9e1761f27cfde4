"""The zarr arrays that a checkpoint's own file names, opened all at once."""

from collections.abc import Mapping
from typing import Any

import tensorstore as ts

from glimmer_jax import folder


def opened(path: Any, file: str, futures: Mapping[str, ts.Future]) -> dict[str, ts.TensorStore]:
    """Waits for all of them.

    Args:
      path: of the folder, for messages.
      file: the one in it that names the arrays.
      futures: of `ts.open`, by the array's name.

    Raises:
      OSError: the storage did not answer, or refused.
      ValueError: arrays are missing or damaged; all of them are named.
    """
    arrays, lost = {}, {}
    for name, future in futures.items():
        try:
            arrays[name] = future.result()
        except ValueError as error:
            if not folder.is_damage(error):
                raise folder.unreachable(str(path), error) from error
            lost[name] = error
    if lost:
        raise ValueError(
            f"{path} lacks {len(lost)} arrays that its file {file} names: {', '.join(sorted(lost))}. "
            "Fetch them again."
        ) from next(iter(lost.values()))
    return arrays
