import importlib.util

import pytest

from glimmer_jax.vocabulary import EXTRA_IDS, PYDOCS_MODEL, Vocabulary
from tests.vocabularies import SPECIAL_IDS, train_sentencepiece

TEXTS = [
    "title: json.dumps context: dumps(obj, *, skipkeys=False) Serialize obj.",
    "zzyx.QwertyUiop._never_seen2(a, b=17)",
    "日本 naïve 🙂 \u2028",
    "json.dumps [SEP] default of indent",
]


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary("pydocs")


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(vocabulary, text):
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert 2 not in ids and vocabulary.eos_id not in ids


def test_names_are_cut_at_dots_underscores_and_brackets(vocabulary):
    pieces = [vocabulary.processor.IdToPiece(one) for one in vocabulary.encode("os.get_it(a, 12)")]
    assert {".", "_", "("} <= set(pieces)
    assert not any(mark in piece for mark in "._(" for piece in pieces if piece != mark)
    assert "12" not in pieces


def test_words_are_pieces_that_can_form_names(vocabulary):
    words = vocabulary.words()
    assert "mailbox" in words and len(words) == len(set(words)) > 500
    assert all(word.isidentifier() or word[0].isdigit() for word in words)
    # As a part of a name each is cut into few pieces, mostly one.
    alone = [len(vocabulary.encode(f"x.{word}")) - len(vocabulary.encode("x.")) for word in words]
    assert sum(n == 1 for n in alone) > len(words) / 2


def test_special_ids_are_t5s(vocabulary):
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.processor.unk_id()) == (0, 1, 2)
    assert vocabulary.processor.bos_id() == -1
    assert vocabulary.vocab_size % 128 == 0
    assert vocabulary.sentinel(0) == vocabulary.vocab_size - 1
    assert vocabulary.sentinel(EXTRA_IDS - 1) == vocabulary.processor.GetPieceSize()
    with pytest.raises(ValueError, match="0 to 99, got 100"):
        vocabulary.sentinel(100)


def test_decoding_stops_at_the_end_token_and_spells_sentinels(vocabulary):
    a, b = vocabulary.encode("one two"), vocabulary.encode("three")
    assert vocabulary.decode([*a, 0, 0, 1, *b]) == "one two"
    mixed = [vocabulary.sentinel(0), *a, vocabulary.sentinel(1), *b, 1]
    assert vocabulary.decode(mixed) == "<extra_id_0> one two <extra_id_1> three"


def test_ids_outside_the_vocabulary_are_rejected(vocabulary):
    for token in (vocabulary.vocab_size, -3):
        with pytest.raises(ValueError, match=f"{token} is outside .* {vocabulary.vocab_size} ids"):
            vocabulary.decode([5, token])
    # Nothing is decoded after the end.
    assert vocabulary.decode([1, vocabulary.vocab_size]) == ""


def train(path, **settings):
    sentences = [f"word{i} fox {chr(97 + i % 26) * 3}" for i in range(500)]
    train_sentencepiece(path, sentences, vocab_size=200, **settings)
    return Vocabulary(path)


def test_a_file_with_sentinels_of_its_own_gets_none_on_top(tmp_path):
    # mT5's file, in small.
    pieces = [f"<extra_id_{i}>" for i in range(99, -1, -1)]
    mt5 = train(tmp_path / "mt5.model", user_defined_symbols=pieces, **SPECIAL_IDS)
    assert mt5.vocab_size == mt5.processor.GetPieceSize()
    assert mt5.sentinel(3) == mt5.processor.PieceToId("<extra_id_3>")
    assert mt5.decode([mt5.sentinel(0), *mt5.encode("fox"), mt5.sentinel(99)]).split() == [
        *("<extra_id_0>", "fox", "<extra_id_99>")
    ]
    with pytest.raises(ValueError, match="0 to 99, got 100"):
        mt5.sentinel(100)
    if importlib.util.find_spec("seqio"):
        assert mt5.seqio().vocab_size == mt5.vocab_size


@pytest.mark.parametrize(
    ("special", "message"),
    [
        ({}, "pad_id=-1, eos_id=2 and unk_id=0"),
        (dict(pad_id=0, eos_id=-1, unk_id=2, bos_id=-1), "pad_id=0, eos_id=-1 and unk_id=2"),
        (dict(pad_id=-1, eos_id=1, unk_id=2, bos_id=-1), "pad_id=-1, eos_id=1 and unk_id=2"),
        (dict(pad_id=0, eos_id=2, unk_id=1, bos_id=-1), "pad_id=0, eos_id=2 and unk_id=1"),
    ],
)
def test_files_with_other_special_ids_are_rejected_with_the_remedy(tmp_path, special, message):
    if special.get("pad_id") == -1 and special.get("eos_id") == 1:
        special = {**special, "bos_id": 0}
    with pytest.raises(ValueError, match=f"{message}.*SentencePieceTrainer.*pad_id=0, eos_id=1"):
        train(tmp_path / "own.model", **special).vocab_size  # noqa: B018


def test_the_fingerprint_is_of_file_and_sentinels(tmp_path, vocabulary):
    copy = tmp_path / "copy.model"
    copy.write_bytes(PYDOCS_MODEL.read_bytes())
    assert Vocabulary(copy).fingerprint == vocabulary.fingerprint
    assert Vocabulary(copy, extra_ids=0).fingerprint != vocabulary.fingerprint
    copy.write_bytes(PYDOCS_MODEL.read_bytes() + b"\0")
    assert Vocabulary(copy).fingerprint != vocabulary.fingerprint


def test_invalid_files_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="VOCABULARY: no file .*absent"):
        Vocabulary(tmp_path / "absent")
    intact = PYDOCS_MODEL.read_bytes()
    no_utf8 = intact.replace(b"\xe2\x96\x81", b"\xe2\x96\xff")
    for data in (b"no model", b"", intact[:-1], intact[: len(intact) // 2], no_utf8):
        (tmp_path / "damaged").write_bytes(data)
        with pytest.raises(ValueError, match="damaged is not a SentencePiece model"):
            Vocabulary(tmp_path / "damaged").vocab_size  # noqa: B018
    with pytest.raises(ValueError, match="extra_ids must be at least 0, got -1"):
        Vocabulary("pydocs", extra_ids=-1)


@pytest.mark.filterwarnings("ignore")
def test_seqio_sees_the_same_ids(vocabulary):
    pytest.importorskip("seqio")
    theirs = vocabulary.seqio()
    assert theirs.vocab_size == vocabulary.vocab_size
    assert (theirs.pad_id, theirs.eos_id) == (vocabulary.pad_id, vocabulary.eos_id)
    for text in TEXTS:
        assert list(theirs.encode(text)) == vocabulary.encode(text)
        assert theirs.encode_tf(text).numpy().tolist() == vocabulary.encode(text)
    assert theirs.encode("<extra_id_0>")[-1] == vocabulary.sentinel(0)
    assert theirs.decode([vocabulary.sentinel(3)]) == "<extra_id_3>"
