"""Serves the shipped GLIMMER on the built-in corpus and opens its page in the browser.

    python -m experiments.demo [--port=8000] [--no_browser]

The first run tokenises the corpus and encodes it into memory, in `data/pydocs`.
"""

import argparse
import contextlib
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from experiments.command import glimmer
from glimmer_jax.shipped import CHECKPOINTS

CHECKPOINT = CHECKPOINTS / "pydocs_glimmer.safetensors"
MEMORY = "data/pydocs/demo_memory"


def main(argv: Sequence[str] | None = None) -> None:
    """Builds passages and memory if they are missing, then serves until Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--no_browser", action="store_true")
    args = parser.parse_args(argv)
    if not Path("data/pydocs/passages").is_dir():
        glimmer("passages", "examples/pydocs_passages")
    glimmer(
        "build_memory",
        "runs/build_memory",
        CHECKPOINT_PATH=CHECKPOINT,
        PASSAGES_DIR="data/pydocs/passages",
        MEMORY_DIR=MEMORY,
    )
    url = f"http://127.0.0.1:{args.port}/"
    if not args.no_browser:
        threading.Thread(target=_open_when_ready, args=(url,), daemon=True).start()
    print(f"\nThe page: {url} (Ctrl-C stops the server)\n", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # the server receives it too, and drains
        glimmer(
            "serve",
            "examples/pydocs_glimmer_serve",
            CHECKPOINT_PATH=CHECKPOINT,
            MEMORY_DIR=MEMORY,
            PORT=args.port,
        )


def _open_when_ready(url: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(url + "readyz", timeout=1):
                webbrowser.open(url)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)


if __name__ == "__main__":
    main()
