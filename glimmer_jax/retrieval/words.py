"""Words of a text for BM25, in any script.

    words("Call os.path_of(x)!")  ->  ["call", "os", "path", "of", "x", "os.path_of"]
    words("日本語 text")           ->  ["日本", "本語", "text"]

Text is brought to Unicode's normal form NFKC, so that composed and decomposed letters are equal, and
full-width letters and ligatures equal plain ones; and to lower case (`ß` becomes `ss`). Invisible
hyphens and joiners are dropped. Combining marks belong to their letters: most vowels of Thai and Indic
scripts are marks.

Scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) give overlapping pairs of
letters, as in Lucene's CJKAnalyzer. A letter alone is a word; inside a longer run only pairs are.
"""

import functools
import itertools
import re
import unicodedata

# Thai, Lao, Burmese, Khmer, kana and ideographs.
_UNSPACED = (
    "\u0e01-\u0e4e\u0e81-\u0ece\u1000-\u103f\u1780-\u17d3\u3005-\u3007\u3041-\u30ff"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
# Soft hyphen, tatweel, zero-width space, non-joiner and joiner, word joiner, byte order mark, variation
# selectors.
_INVISIBLE = dict.fromkeys(
    (0xAD, 0x640, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, *range(0xFE00, 0xFE10))
    + (*range(0xE0100, 0xE01F0),)
)
# What lower case makes of a Turkish capital I.
_DOTTED = "i\u0307"
_LAST_MARK = 0x1FFFF
_ASCII_WORD = re.compile(r"[^\W_]+", re.ASCII)
_NAME = re.compile(r"[^\W\d]\w*(?:\.\w+)+|\w*_\w+")


def words(text: str) -> list[str]:
    """Lower-case words in order, followed by complete qualified names."""
    if text.isascii():
        text = text.lower()
        return _ASCII_WORD.findall(text) + _NAME.findall(text)
    text = (
        unicodedata.normalize("NFKC", text.translate(_INVISIBLE)).casefold().replace(_DOTTED, "i")
    )
    # Lower case can have decomposed letters.
    text = unicodedata.normalize("NFKC", text)
    unspaced, spaced = _patterns()
    tokens = []
    for match in spaced.finditer(text):
        if unspaced.match(match[0]):
            tokens += _pairs(unspaced.findall(match[0]))
        else:
            tokens.append(match[0])
    return tokens + _NAME.findall(text)


def _pairs(letters: list[str]) -> list[str]:
    if len(letters) < 2:
        return letters
    return [first + second for first, second in itertools.pairwise(letters)]


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A letter of an unspaced script with its marks; a run of those, or a word of other letters."""
    marks = "".join(chr(i) for i in range(_LAST_MARK) if unicodedata.category(chr(i))[0] == "M")
    letter = f"(?![{marks}])[{_UNSPACED}][{marks}]*"
    return re.compile(letter), re.compile(
        f"(?:{letter})+|(?:(?![{_UNSPACED}])[^\\W_][{marks}]*)+", re.UNICODE
    )
