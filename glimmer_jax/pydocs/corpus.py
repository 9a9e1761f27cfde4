"""The built-in corpus: the documentation of the Python standard library, as short passages.

It offers English text on thousands of subjects without a download, for the quickstart, the tests
and the shipped checkpoints. Each documented object is a page, cut into passages of a few sentences;
the first passage starts with the signature. Modules are split into train, dev and test, so that
training never sees text of held-out modules. Contents differ slightly between Python versions, but
the split of a module does not.
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
# Maximum length of a passage's text. In characters, because a word of a signature has many tokens:
# 99 % of the passages, including title and synthetic names, fit into 120 tokens of the built-in
# vocabulary.
MAX_CHARACTERS = 200
# Longer signatures would leave no room for the docstring.
MAX_SIGNATURE_CHARACTERS = 120

# Modules that share sentences belong to the same split. Modules that the language reference quotes
# are in the training split, as is the language reference (topics).
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
    """One documented object.

    Attributes:
      documented: the object.
      split: train, dev or test, the split of its module.
      chunks: sentences of each passage.
    """

    documented: Documented
    split: str
    chunks: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        """Qualified name, which is the title of the page."""
        return self.documented.name

    @property
    def signature(self) -> str:
        """The shortened signature; "" if unknown."""
        return short_signature(self.documented.signature)

    def text(self, chunk: int) -> str:
        """Text of one passage; the first passage starts with the signature."""
        head = (self.signature,) if chunk == 0 and self.signature else ()
        return " ".join(head + self.chunks[chunk])


def split_of(module: str) -> str:
    """The split (train, dev or test) of a dotted module name; the same for every Python version."""
    top = module.split(".")[0]
    family = _FAMILY.get(top, top)
    if family == "train":
        return "train"
    place = stable_hash(_SALT, family) % 1000
    return "train" if place < 700 else "dev" if place < 780 else "test"


def passage_id(name: str, chunk: int) -> int:
    """External id of a passage, 0 <= id < 2**63."""
    return stable_hash("passage", name, chunk)


def short_signature(signature: str) -> str:
    """Shortens a signature to at most `MAX_SIGNATURE_CHARACTERS`; `...` marks the omitted part."""
    return textwrap.shorten(signature, MAX_SIGNATURE_CHARACTERS, placeholder=" ...)")


def sentences(doc: str) -> list[str]:
    """Sentences of a docstring, without interpreter sessions, rules and table borders."""
    doc = re.sub(r"(?m)^[ \t]*>>>(.*\n?)(?:[ \t]*\S.*\n?)*", "\n", doc)
    doc = re.sub(r"(?m)^[ \t]*([-=~*^#+])\1{2,}[ \t]*$", "\n", doc)
    doc = re.sub(r"[-=+|_*#~]{4,}|(?<= )\|(?= )|\S{48,}", " ", doc)
    pieces = []
    for paragraph in re.split(r"\n[ \t]*\n|\n(?=[ \t]*[-*] )", doc):
        text = " ".join(paragraph.split())
        pieces.extend(re.split(r"(?<=[.!?])\s+(?=[A-Z\"'(`*])", text))
    return [sentence for sentence in pieces if re.search(r"[A-Za-z]{2}", sentence)]


def pack(texts: list[str], reserved: int, limit: int) -> tuple[tuple[str, ...], ...]:
    """Packs sentences, in order, into chunks of at most `limit` characters.

    Args:
      texts: sentences; those longer than `limit` are split between words.
      reserved: characters of the first chunk that the signature takes.
      limit: characters per chunk, including the spaces between sentences.
    """
    chunks: list[list[str]] = [[]]
    room = limit - reserved
    for sentence in texts:
        for piece in textwrap.wrap(sentence, limit, break_long_words=False, break_on_hyphens=False):
            if len(piece) > room:
                chunks.append([])
                room = limit
            chunks[-1].append(piece)
            room -= len(piece) + 1  # with the space
    if not chunks[0] and not reserved:
        chunks.pop(0)
    return tuple(tuple(pieces) for pieces in chunks)


@functools.cache
def pages() -> tuple[Page, ...]:
    """Every page of the corpus, sorted by module and name."""
    objects = documented_objects()
    topics = _distinct_topics([item for item in objects if item.kind == "topic"])
    corpus = []
    for item in objects:
        texts = topics[item.name] if item.kind == "topic" else sentences(item.doc)
        signature = short_signature(item.signature)
        chunks = pack(texts, len(signature) + 1 if signature else 0, MAX_CHARACTERS)
        if chunks:
            corpus.append(Page(item, split_of(item.module), chunks))
    return tuple(corpus)


def _distinct_topics(items: list[Documented]) -> dict[str, list[str]]:
    """Sentences of each topic without those of shorter topics, since long topics include others."""
    seen: set[str] = set()
    by_name = {}
    for item in sorted(items, key=lambda item: (len(item.doc), item.name)):
        by_name[item.name] = [text for text in sentences(item.doc) if text not in seen]
        seen.update(by_name[item.name])
    return by_name


def passages() -> Iterator[dict[str, Any]]:
    """Yields the corpus, one record per passage.

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
    """Records of the training modules: the only plain text that training may read."""
    return [record for record in passages() if record["split"] == "train"]
