"""The documentation's pages and their fenced blocks."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What a block may need beyond the checkout, its environment and the built-in corpus: what it does, and
# the module with which it can run here.
NEEDS = {
    "beam": ("installs Apache Beam", None),
    "checkpoint": ("reads checkpoints of long training runs", None),
    "data": ("reads the user's own data", None),
    "docker": ("builds a container image", None),
    "download": ("downloads files or packages", None),
    "encoder": ("reads published GTR weights", None),
    "gcloud": ("creates machines in a cloud", None),
    "gpu": ("runs on a GPU, as tests/gpu_test.py does", None),
    "hours": ("trains for hours", None),
    "kilt": ("reads KILT's files; tests/kilt_road_test.py reads a miniature", None),
    "kubernetes": ("changes a Kubernetes cluster", None),
    "libtpu": ("uses XLA's TPU compiler", "libtpu"),
    "server": ("asks a running server, as tests/server does", None),
    "slurm": ("submits jobs to a Slurm cluster", None),
    "t5x": ("runs T5X", "t5x"),
    "terminal": ("is typed at a prompt", "sys"),
    "torch": ("runs PyTorch", "torch"),
    "xmanager": ("runs XManager", "xmanager"),
}


def read(page):
    return page.read_text(encoding="utf-8")


def blocks(page):
    """(language, needs, text) of every fenced block; `needs` is None without a marker."""
    pattern = r"(?:^<!-- needs: (.*?) -->\n)?^```(\S*)\n(.*?)^```$"
    for needs, language, text in re.findall(pattern, read(page), re.DOTALL | re.MULTILINE):
        yield language, needs or None, text
