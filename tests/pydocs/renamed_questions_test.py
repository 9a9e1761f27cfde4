"""Renamed questions: the same facts under names that a model cannot have memorised."""

import pytest

from glimmer_jax.pydocs import renamed_questions
from glimmer_jax.pydocs.renamed_questions import RenamedQuestions
from glimmer_jax.vocabulary import Vocabulary

VOCABULARY = Vocabulary("pydocs")
NAMES = ["os.path.join", "os.path.split", "json.dumps", "zlib.crc32"]
RECORDS = {
    i: {"title": name, "text": f"{name.rpartition('.')[2]}(a, b=None) Text number {i}."}
    for i, name in enumerate(NAMES)
}


def line(question, answer, about):
    retrieved = [{"id": i, "gold": NAMES[i] == about} for i in range(len(NAMES))]
    output = [{"answer": answer, "provenance": [{"title": about}]}]
    return {"input": question, "output": output, "retrieved": retrieved}


def questions(passages=4, **tasks):
    return RenamedQuestions(tasks, RECORDS, passages, VOCABULARY, seed=1)


def read(example):
    """(question, answer, passages) as text; the gold passage's title and text."""
    texts = [VOCABULARY.decode(ids) for ids in example["passages"]]
    gold = texts[example["gold_passages"].index(1)]
    title, _, text = gold.removeprefix("title: ").partition(" context: ")
    question = VOCABULARY.decode(example["inputs"]).removeprefix("question: ")
    return question, VOCABULARY.decode(example["targets"]), texts, title, text


def test_the_answer_is_the_new_title_of_the_gold_passage():
    renamed = questions(which=[line("text number zero", "os.path.join", "os.path.join")])
    seen = set()
    for index in range(20):
        question, answer, texts, title, text = read(renamed.example(index))
        assert question == "text number zero" and answer == title
        assert text == f"{title.rpartition('.')[2]}(a, b=None) Text number 0."
        assert len({one.partition(" context: ")[0] for one in texts}) == 4
        seen.add(title)
    assert len(seen) > 10


def test_answers_start_with_pieces_that_no_title_has():
    renamed = questions(which=[line("text number zero", "os.path.join", "os.path.join")])
    first = {VOCABULARY.encode(read(renamed.example(index))[1])[1] for index in range(200)}
    own = {VOCABULARY.encode(name)[1] for name in NAMES}
    assert len(first - own) > 50


def test_a_text_mentions_its_own_new_title():
    records = {**RECORDS, 0: {"title": "os.path.join", "text": "join(a) Use join, not joined."}}
    asked = [line("text", "os.path.join", "os.path.join")]
    renamed = RenamedQuestions({"which": asked}, records, 4, VOCABULARY, seed=1)
    for index in range(10):
        _, _, _, title, text = read(renamed.example(index))
        new = title.rpartition(".")[2]
        assert text == f"{new}(a) Use {new}, not joined."


def test_siblings_stay_siblings():
    renamed = questions(which=[line("text", "os.path.join", "os.path.join")])
    for index in range(10):
        _, _, texts, title, _ = read(renamed.example(index))
        prefix = title.rpartition(".")[0]
        assert sum(text.startswith(f"title: {prefix}.") for text in texts) == 2


def test_questions_that_name_a_page_use_its_new_name():
    asked = line("json.dumps [SEP] default of b", "None", "json.dumps")
    for index in range(10):
        question, answer, _, title, _ = read(questions(slots=[asked]).example(index))
        assert question == f"{title} [SEP] default of b" and answer == "None"


def test_parts_may_repeat_within_a_title_but_titles_are_distinct():
    renamed = questions(which=[line("text", "os.path.join", "os.path.join")])
    repeated = 0
    for index in range(100):
        _, _, texts, title, _ = read(renamed.example(index))
        assert len({text.partition(" context: ")[0] for text in texts}) == 4
        parts = title.lower().split(".")
        repeated += len(set(parts)) < len(parts)
    assert 5 < repeated < 50


@pytest.mark.parametrize("about", NAMES)
def test_the_gold_passage_is_among_the_first_three(about):
    renamed = questions(which=[line("text", about, about)])
    places = [renamed.example(index)["gold_passages"].index(1) for index in range(30)]
    # At its rank, or swapped from rank 4 to a random one of the first three.
    assert set(places) == ({NAMES.index(about)} if about != NAMES[3] else {0, 1, 2})


def test_questions_without_a_gold_passage_are_dropped():
    with_gold, without = line("kept", "json.dumps", "json.dumps"), line("dropped", "json", "json")
    renamed = questions(which=[with_gold, without])
    assert {read(renamed.example(index))[0] for index in range(20)} == {"kept"}
    with pytest.raises(ValueError, match="4 retrieved passages .*gold"):
        questions(which=[without])


def test_examples_depend_only_on_seed_and_index():
    asked = [line(f"text {i}", "json.dumps", "json.dumps") for i in range(5)]
    first, again = questions(which=asked), questions(which=asked)
    assert [first.example(i) for i in range(8)] == [again.example(i) for i in (range(8))]
    assert first.example(0) != first.example(1)


def test_too_few_passages_are_rejected():
    with pytest.raises(ValueError, match="which .*5 retrieved passages"):
        questions(passages=5, which=[line("text", "json.dumps", "json.dumps")])


def test_questions_of_another_corpus_are_rejected():
    asked = line("text", "json.dumps", "json.dumps")
    asked["retrieved"][1]["id"] = 99
    with pytest.raises(ValueError, match="DATA_DIR: .* passage 99, .*run_mode=retrieve"):
        questions(which=[asked])


def test_one_mapping_serves_question_answer_and_passages():
    records = {
        **RECORDS,
        2: {
            "title": "json.dumps",
            "signature": "dumps(obj, *, sep=', ', split=8192)",
            "text": "dumps(obj, *, sep=', ', split=8192) Writes obj, in 8192 parts.",
        },
    }
    asked = [line("json.dumps [SEP] default of split", "8192", "json.dumps")]
    asked.append(line("The first parameter in json.dumps is b.", "REFUTES", "json.dumps"))
    renamed = RenamedQuestions({"slots": asked}, records, 4, VOCABULARY, seed=1)
    for index in range(40):
        question, answer, _, title, text = read(renamed.example(index))
        first = text.partition("(")[2].partition(",")[0]
        assert f"Writes {first}, in " in text and first != "obj"
        if answer == "REFUTES":
            # A parameter of no passage is renamed as well; otherwise it would reveal the false
            # claim.
            value = question.removeprefix(f"The first parameter in {title} is ").removesuffix(".")
            assert value not in ("b", first)
        else:
            name = question.removeprefix(f"{title} [SEP] default of ")
            assert f"{name}={answer})" in text and f"in {answer} parts" in text
            assert name != "split" and len(answer) == 4


def test_the_wording_of_a_question_is_never_renamed():
    records = {**RECORDS, 2: {"title": "first.parameter", "text": "parameter(a) The default."}}
    asked = [line("The first parameter in first.parameter is a.", "SUPPORTS", "first.parameter")]
    for one in asked:
        one["retrieved"] = [{"id": i, "gold": i == 2} for i in range(4)]
    renamed = RenamedQuestions({"claims": asked}, records, 4, VOCABULARY, seed=1)
    for index in range(20):
        question, _, _, title, _ = read(renamed.example(index))
        assert question.startswith(f"The first parameter in {title} is ")


@pytest.mark.parametrize("about", NAMES)
def test_num_kept_1_keeps_only_the_gold_passage(about):
    asked = {"which": [line("text", about, about)]}
    renamed = RenamedQuestions(asked, RECORDS, 4, VOCABULARY, num_kept=1)
    for index in range(10):
        example = renamed.example(index)
        assert example["gold_passages"] == [1] and len(example["passages"]) == 1
        _, answer, _, title, _ = read(example)
        assert answer == title


def test_different_streams_give_different_examples():
    asked = [line("text", "json.dumps", "json.dumps")]
    renamed = questions(which=asked)
    assert renamed.example(3, "train:0") == renamed.example(3, "train:0")
    assert renamed.example(3, "train:0") != renamed.example(3, "train:1")


def test_a_question_whose_words_no_mapping_keeps_distinct_raises(monkeypatch):
    monkeypatch.setattr(renamed_questions, "ATTEMPTS", 2)
    monkeypatch.setattr(renamed_questions, "synthetic_name", lambda *_: "same")
    with pytest.raises(ValueError, match="2 random mappings .* question 'text'"):
        questions(which=[line("text", "json.dumps", "json.dumps")]).example(0)
