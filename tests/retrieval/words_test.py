import unicodedata

import pytest

from glimmer_jax.retrieval.words import words


def test_qualified_names_are_indexed_complete_and_in_parts():
    assert words("Call os.path_of(x)!") == ["call", "os", "path", "of", "x", "os.path_of"]


def test_combining_marks_belong_to_their_letters():
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert words("nai\u0308ve") == ["na\u00efve"]
    # A mark that composes with nothing stays.
    assert words("x\u0302y z") == ["x\u0302y", "z"]


@pytest.mark.parametrize("text", ["Beyonc\u00e9 na\u00efve", "ガギグ é", "각 한국어 단어"])
def test_composed_and_decomposed_text_has_the_same_words(text):
    assert words(unicodedata.normalize("NFD", text)) == words(unicodedata.normalize("NFC", text))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ｃａｆé ﬁnal", "cafe\u0301 final"),
        ("STRASSE", "Straße"),
        ("co\u00adoperate", "cooperate"),
        ("می\u200cخواهم", "میخواهم"),
        ("ｶﾞｷﾞ", "ガギ"),
        ("İstanbul", "i\u0307stanbul"),
        ("İstanbul", "istanbul"),
        ("葛\U000e0100城", "葛城"),
        ("辻\ufe00堂", "辻堂"),
        ("so\u200bup", "soup"),
        ("مـــدينة", "مدينة"),
    ],
)
def test_letters_that_look_alike_have_the_same_words(one, other):
    assert words(one) == words(other) != []


def test_scripts_without_spaces_give_pairs_of_letters():
    assert words("日本語 text") == ["日本", "本語", "text"]
    assert words("水") == ["水"]
    assert words("1989年カタカナー") == ["1989", "年カ", "カタ", "タカ", "カナ", "ナー"]
    assert words("한국어 단어") == ["한국어", "단어"]


def test_thai_words_that_differ_in_a_mark_share_nothing():
    assert not set(words("เสือ")) & set(words("เสื้อ"))


def test_marks_and_punctuation_without_letters_are_no_words():
    assert words("!!! ??? \u0301") == []
