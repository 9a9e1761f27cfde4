"""Questions on the built-in corpus, in KILT's form: which function, slot filling, fact verification.

Every example names the passage that answers it: page as `wikipedia_id` and `title`, chunk as
paragraph. Choices are made by hashing names, so the same Python gives the same questions.
"""

from typing import Any

from glimmer_jax.pydocs import clauses, corpus, signatures

TASKS = ("which_function", "slot_filling", "fact_verification")
# Which function: questions of a page, and of one sentence, at most. Of training pages more are asked:
# what comes again and again is learnt by heart.
QUESTIONS = {"train": (32, 8), "dev": (4, 3), "test": (4, 3)}

Example = dict[str, Any]


def all_tasks() -> dict[tuple[str, str], list[Example]]:
    """Examples by (task, split), each list in an order that mixes modules."""
    pages = corpus.pages()
    made = {
        "which_function": which_function(pages),
        "slot_filling": slot_filling(pages),
        "fact_verification": fact_verification(pages),
    }
    by_split: dict[tuple[str, str], list[Example]] = {}
    for task, rows in made.items():
        for split in corpus.SPLITS:
            found = [example for one, example in rows if one == split]
            found.sort(key=lambda example: corpus.stable_hash("order", example["id"]))
            by_split[task, split] = found
    return by_split


def which_function(pages: tuple[corpus.Page, ...]) -> list[tuple[str, Example]]:
    """(split, example): a clause of one sentence asks for the name of the object.

    `{"input": "formatted stream to file-like object", "output": [{"answer": "json.dump", …}]}`
    """
    made = []
    index = clauses.ClauseIndex(pages)
    for page in pages:
        if page.documented.kind not in ("function", "class", "property"):
            continue
        common = clauses.common_clauses(page, index, *QUESTIONS[page.split])
        for number, (chunk, clause) in enumerate(common):
            made.append(_example("which_function", page, number, clause, page.name, chunk))
    return made


def slot_filling(pages: tuple[corpus.Page, ...]) -> list[tuple[str, Example]]:
    """(split, example): `json.dumps [SEP] default of indent` -> `None`."""
    made = []
    for page in pages:
        for number, slot in enumerate(signatures.slots(page)):
            question = f"{page.name} [SEP] {slot.relation}"
            made.append(_example("slot_filling", page, number, question, slot.value, 0))
    return made


def fact_verification(pages: tuple[corpus.Page, ...]) -> list[tuple[str, Example]]:
    """(split, example): claims on signatures and docstrings -> SUPPORTS or REFUTES, as many of each.

    Two siblings' details are told of both: each subject and each detail is met once in a true claim
    and once in a false one, so that neither betrays the answer.
    """
    made = []
    for pair in signatures.signature_pairs(pages) + clauses.clause_pairs(pages):
        for page, claim, chunk, truth in pair:
            answer = "SUPPORTS" if truth else "REFUTES"
            number = corpus.stable_hash(claim) % 10**8
            made.append(_example("fact_verification", page, number, claim, answer, chunk))
    return made


def _example(
    task: str, page: corpus.Page, number: int, question: str, answer: str, chunk: int
) -> tuple[str, Example]:
    provenance = {
        "wikipedia_id": page.name,
        "title": page.name,
        "start_paragraph_id": chunk,
        "end_paragraph_id": chunk,
        "bleu_score": 1.0,
    }
    return page.split, {
        "id": f"{task}/{page.name}/{number}",
        "input": question,
        "output": [{"answer": answer, "provenance": [provenance]}],
        "meta": {},
    }
