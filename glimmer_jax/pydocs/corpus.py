"""The built-in corpus: the documentation every Python installation carries, as short passages.

Real English on thousands of subjects without a download, for the quickstart, the tests and the
shipped checkpoints. Each documented object is a page, cut into passages of a few sentences, the
signature at the head of the first. Pages are split into train, dev and test by module, so that
nothing of a held-out module is trained on. Contents differ a little between Python versions; the
split of a module never does.
"""

import dataclasses
import functools
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from glimmer_jax.corpus.ids import stable_hash
from glimmer_jax.pydocs.objects import Documented, documented_objects

SPLITS = ("train", "dev", "test")
# Of a passage's text. Characters, because the words of signatures are many tokens each: with the
# built-in vocabulary 99 % of the passages, title and made-up names included, fit into 120 tokens.
MAX_CHARACTERS = 200
# Longer signatures leave no room for the docstring.
MAX_SIGNATURE_CHARACTERS = 120

# Modules that copy each other's sentences stay together; those that the language reference quotes,
# with it in the training split.
_FAMILIES = (
    ("train", "base64 bdb binascii builtins cmd collections pdb topics types typing"),
    ("multiprocessing", "asyncio concurrent queue select selectors socket ssl threading"),
    ("email", "http mailbox mimetypes socketserver wsgiref xmlrpc"),
    ("os", "posixpath shutil"),
    ("bz2", "gzip lzma"),
    ("math", "cmath"),
    ("pwd", "grp resource spwd"),
    ("profile", "cProfile pstats"),
    ("importlib", "imp pkgutil runpy zipimport"),
    ("smtpd", "asynchat asyncore"),
    ("aifc", "sunau wave"),
    ("dbm", "shelve"),
    ("urllib", "cgi"),
    ("tarfile", "zipfile"),
    ("code", "codeop"),
    ("ftplib", "imaplib nntplib poplib smtplib telnetlib"),
    ("argparse", "getopt optparse"),
    ("ast", "inspect"),
    ("compileall", "py_compile"),
)
_FAMILY = {module: family for family, members in _FAMILIES for module in members.split()}
_SALT = "glimmer-pydocs-1322"


@dataclasses.dataclass(frozen=True)
class Page:
    """One documented object, cut into chunks of sentences; `split` is its module's."""

    documented: Documented
    split: str
    chunks: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        return self.documented.name

    @property
    def signature(self) -> str:
        return short_signature(self.documented.signature)

    def text(self, chunk: int) -> str:
        """Text of one passage: the first starts with the signature."""
        head = (self.signature,) if chunk == 0 and self.signature else ()
        return " ".join(head + self.chunks[chunk])


def split_of(module: str) -> str:
    """train, dev or test for a module's dotted name; the same for every Python version."""
    top = module.split(".")[0]
    family = _FAMILY.get(top, top)
    if family == "train":
        return "train"
    place = stable_hash(_SALT, family) % 1000
    return "train" if place < 700 else "dev" if place < 780 else "test"


def passage_id(name: str, chunk: int) -> int:
    """External id of a passage: non-negative, below 2**63."""
    return stable_hash("passage", name, chunk)


def short_signature(signature: str) -> str:
    """A signature of at most `MAX_SIGNATURE_CHARACTERS`; `...` stands for what was cut."""
    return textwrap.shorten(signature, MAX_SIGNATURE_CHARACTERS, placeholder=" ...)")


def sentences(doc: str) -> list[str]:
    """A docstring as sentences: no interpreter sessions, rules or table borders, plain spaces."""
    doc = re.sub(r"(?m)^[ \t]*>>>(.*\n?)(?:[ \t]*\S.*\n?)*", "\n", doc)
    doc = re.sub(r"(?m)^[ \t]*([-=~*^#+])\1{2,}[ \t]*$", "\n", doc)
    doc = re.sub(r"[-=+|_*#~]{4,}|(?<= )\|(?= )|\S{48,}", " ", doc)
    found = []
    for paragraph in re.split(r"\n[ \t]*\n|\n(?=[ \t]*[-*] )", doc):
        text = " ".join(paragraph.split())
        found.extend(re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(`*])", text))
    return [sentence for sentence in found if re.search(r"[A-Za-z]{2}", sentence)]


def chunk(found: list[str], taken: int, most: int) -> tuple[tuple[str, ...], ...]:
    """Packs sentences, in order, into chunks of at most `most` characters.

    Longer sentences are cut between words. `taken` characters of the first chunk are the signature's.
    """
    chunks: list[list[str]] = [[]]
    room = most - taken
    for sentence in found:
        for piece in textwrap.wrap(sentence, most, break_long_words=False, break_on_hyphens=False):
            if len(piece) > room:
                chunks.append([])
                room = most
            chunks[-1].append(piece)
            room -= len(piece) + 1  # the space between
    if not chunks[0] and not taken:
        chunks.pop(0)
    return tuple(tuple(one) for one in chunks)


@functools.cache
def pages() -> tuple[Page, ...]:
    """Every page of the corpus, sorted by module and name."""
    objects = documented_objects()
    topics = _distinct_topics([item for item in objects if item.kind == "topic"])
    made = []
    for item in objects:
        found = topics[item.name] if item.kind == "topic" else sentences(item.doc)
        signature = short_signature(item.signature)
        chunks = chunk(found, len(signature) + 1 if signature else 0, MAX_CHARACTERS)
        if chunks:
            made.append(Page(item, split_of(item.module), chunks))
    return tuple(made)


def _distinct_topics(items: list[Documented]) -> dict[str, list[str]]:
    """Sentences of each topic, less those of shorter topics: long topics repeat whole others."""
    seen: set[str] = set()
    found = {}
    for item in sorted(items, key=lambda item: (len(item.doc), item.name)):
        found[item.name] = [one for one in sentences(item.doc) if one not in seen]
        seen.update(found[item.name])
    return found


def passages() -> Iterator[dict[str, Any]]:
    """The corpus: one record for each passage.

    `{"id": 5313…, "title": "json.dumps", "text": "dumps(obj, *, skipkeys=False, …) Serialize …",
    "page": "json.dumps", "chunk": 0, "module": "json", "split": "train", "signature": "dumps(…)"}`
    """
    for page in pages():
        for index in range(len(page.chunks)):
            yield {
                "id": passage_id(page.name, index),
                "title": page.name,
                "text": page.text(index),
                "page": page.name,
                "chunk": index,
                "module": page.documented.module,
                "split": page.split,
                "signature": page.signature,
            }


def train_texts() -> list[dict[str, Any]]:
    """The passages of the training modules: the only plain text that training may read."""
    return [record for record in passages() if record["split"] == "train"]
