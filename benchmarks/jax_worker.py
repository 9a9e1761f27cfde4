"""What measured programs of JAX share."""

from typing import Any

import jax
import numpy as np

from benchmarks import peaks
from benchmarks.setting import Setting


class JaxWorker:
    """One model on the first device; created before its weights, so that peak memory is its own."""

    def __init__(self, setting: Setting, dtype: str):
        self.setting = setting
        self._random = np.random.default_rng(0)
        self._peaks = peaks.jax_peaks(dtype)
        self.details: dict[str, Any] = {
            "framework": f"jax {jax.__version__}",
            "device": jax.devices()[0].device_kind,
        }

    def peaks(self) -> dict[str, float]:
        """Measured peak rates of the device (`peaks.jax_peaks`)."""
        return self._peaks

    def reset_peak(self) -> None:
        """JAX cannot reset it; everything before the measured runs takes less memory."""

    def peak_bytes(self) -> int | None:
        """Peak device memory; None on a CPU."""
        stats = jax.devices()[0].memory_stats()
        return None if stats is None else int(stats["peak_bytes_in_use"])
