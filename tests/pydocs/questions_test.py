from collections import Counter, defaultdict

import pytest

from glimmer_jax.kilt.examples import check_example
from glimmer_jax.pydocs import clauses, corpus, signatures
from glimmer_jax.pydocs.objects import Documented

PAGES = {page.name: page for page in corpus.pages()}


def every(examples, task):
    return [(split, example) for split in corpus.SPLITS for example in examples[task, split]]


def where(example):
    (provenance,) = example["output"][0]["provenance"]
    assert provenance["wikipedia_id"] == provenance["title"]
    return PAGES[provenance["title"]], provenance["start_paragraph_id"]


def test_there_are_thousands_of_questions_in_kilts_format(pydocs_examples):
    assert sum(len(rows) for (_, s), rows in pydocs_examples.items() if s == "test") > 4000
    for (_, split), rows in pydocs_examples.items():
        assert len({example["id"] for example in rows}) == len(rows)
        assert len({example["input"] for example in rows}) == len(rows)
        assert not any(check_example(example) for example in rows)
        assert all(where(example)[0].split == split for example in rows)


def test_a_clause_is_an_ordered_part_of_its_passage_without_the_name(pydocs_examples):
    for _, example in every(pydocs_examples, "which_function"):
        page, chunk = where(example)
        words = example["input"].split()
        assert 5 <= len(words) <= 6
        assert example["output"][0]["answer"] == page.name
        rest = iter(clauses.clean_words(page.text(chunk)))
        assert all(word in rest for word in words), example
        parts = clauses.name_parts(page.name)
        assert not any(part in clauses.name_parts(w) for w in words for part in parts)


def test_a_clause_occurs_in_exactly_one_passage(pydocs_examples):
    index = clauses.ClauseIndex(tuple(PAGES.values()))
    for example in pydocs_examples["which_function", "test"]:
        page, chunk = where(example)
        words = example["input"].split()
        assert index.holders(words, len(words)) <= {(page.name, chunk)}, example


def test_questions_of_a_page_do_not_depend_on_other_pages_order():
    pages = tuple(page for page in PAGES.values() if page.documented.module == "json")
    index = clauses.ClauseIndex(pages)
    reversed_index = clauses.ClauseIndex(pages[::-1])
    for page in pages:
        first = clauses.common_clauses(page, index, 4, 3)
        assert first == clauses.common_clauses(page, reversed_index, 4, 3)


def test_slots_are_filled_from_the_first_passage(pydocs_examples):
    for _, example in every(pydocs_examples, "slot_filling"):
        page, chunk = where(example)
        name, relation = example["input"].split(" [SEP] ")
        answer = example["output"][0]["answer"]
        assert name == page.name and chunk == 0 and answer in page.text(0)
        if relation.startswith("default of "):
            assert f"{relation.removeprefix('default of ')}={answer}" in page.text(0)
    examples = every(pydocs_examples, "slot_filling")
    counts = Counter(example["output"][0]["answer"] for _, example in examples)
    assert counts.most_common(1)[0][1] < 0.15 * counts.total()


def test_claims_are_balanced_in_every_split_and_every_detail(pydocs_examples):
    for split in corpus.SPLITS:
        answers = Counter(
            one["output"][0]["answer"] for one in pydocs_examples["fact_verification", split]
        )
        assert answers["SUPPORTS"] == answers["REFUTES"] > 100
    # Each subject, relation and detail is equally often true and false, so none reveals the answer.
    for cut in (lambda text: text.rsplit(" is ", 1)[0], lambda text: text.rsplit(" is ", 1)[-1]):
        balance = defaultdict(int)
        for _, one in every(pydocs_examples, "fact_verification"):
            if one["input"].startswith("The "):
                balance[cut(one["input"])] += 1 if one["output"][0]["answer"] == "SUPPORTS" else -1
        assert len(balance) > 100 and not any(balance.values())


def test_true_claims_on_defaults_are_true_and_false_ones_false(pydocs_examples):
    checked = Counter()
    for _, one in every(pydocs_examples, "fact_verification"):
        text = one["input"]
        if not text.startswith("The default of "):
            continue
        name, rest = text.removeprefix("The default of ").split(" in ", 1)
        value = rest.split(" is ", 1)[1][:-1]
        page, _ = where(one)
        truth = dict(page.documented.parameters)[name] == value
        assert truth == (one["output"][0]["answer"] == "SUPPORTS"), one
        checked[truth] += 1
    assert min(checked[True], checked[False]) > 500


@pytest.mark.parametrize(
    "word, expected",
    [
        ("dump", True),
        ("dumps", True),
        ("DumpFile", True),
        ("json", True),
        ("JSON-encoded", True),
        ("dictionary", False),
        ("obj", False),
    ],
)
def test_words_that_reveal_the_name_are_detected(word, expected):
    assert clauses.reveals(word, clauses.name_parts("json.dumps")) is expected


def test_name_parts_split_dots_underscores_and_capitals():
    parts = clauses.name_parts("http.HTTPServer.server_bind2")
    assert {"http", "server", "bind", "httpserver"} <= parts


def page_of(name, parameters, signature):
    documented = Documented(name, name.split(".")[0], "function", signature, parameters, "Doc.")
    return corpus.Page(documented, "train", (("Doc.",),))


def test_facts_are_defaults_and_order_of_the_parameters():
    parameters = (("a", None), ("b", "None"), ("c", "''"), ("d", "2"))
    page = page_of("m.f", parameters, "f(a, b=None, *, c='', d=2)")
    assert {(fact.relation, fact.value) for fact in signatures.facts(page)} == {
        ("default of b", "None"),
        ("default of d", "2"),
        ("first parameter", "a"),
        ("parameter after a", "b"),
        ("parameter after b", "c"),
        ("parameter after c", "d"),
    }


def test_facts_omitted_from_a_long_signature_are_not_used():
    parameters = tuple((f"p{i}", str(i)) for i in range(40))
    signature = f"f({', '.join(f'{name}={value}' for name, value in parameters)})"
    page = page_of("m.f", parameters, signature)
    assert page.signature.endswith(" ...)")
    assert len(page.signature) <= corpus.MAX_SIGNATURE_CHARACTERS
    assert all(fact.value in page.signature for fact in signatures.facts(page))
    assert not any("p30" in fact.relation for fact in signatures.facts(page))


def test_signatures_parsed_from_text_have_the_facts_of_their_pages():
    for page in PAGES.values():
        assert signatures.signature_in(f"{page.signature} Does (it).") == page.signature
        shown = signatures.shown_parameters(page.signature)
        for fact in signatures.facts(page):
            assert signatures.value_of(fact.relation, shown) == fact.value


def test_signatures_end_at_their_matching_bracket():
    signature = r"f(a=(), *, b=')', c='\'(', **d)"
    assert signatures.signature_in(signature + " Calls g(x).") == signature
    shown = [("a", "()"), ("b", "')'"), ("c", r"'\'('")]
    assert signatures.shown_parameters(signature) == shown
    for text in ("Calls g(x).", "", "f(a", "f"):
        assert signatures.signature_in(text) == ""
        assert signatures.shown_parameters(text) == []
    assert signatures.value_of("first parameter", []) is None
    assert signatures.value_of("parameter after c", shown) is None
    assert signatures.value_of("default of x", shown) is None


def test_wording_separates_names_and_values_from_fixed_text():
    claim = "The default of indent in json.dumps is None."
    assert signatures.parse_claim(claim) == ("default of indent", "json.dumps", "None")
    first = "The first parameter in json.dumps is obj."
    assert signatures.parse_claim(first) == ("first parameter", "json.dumps", "obj")
    assert signatures.parse_claim("json.dumps: Serialize obj.") is None
    assert signatures.wording(claim)[1::2] == ["indent", "json.dumps", "None"]
    slot = "json.dumps [SEP] parameter after obj"
    assert signatures.wording(slot)[1::2] == ["json.dumps", "obj"]
    assert signatures.wording("json.dumps [SEP] first parameter")[1::2] == ["json.dumps", ""]
    for question in (claim, first, slot, "some words of a docstring"):
        assert "".join(signatures.wording(question)) == question
