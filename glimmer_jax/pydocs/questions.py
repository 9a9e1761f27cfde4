"""Questions on the built-in corpus in KILT's format: which function, slot filling, fact verification.

The provenance of an example names the passage that answers it: the page as `wikipedia_id` and
`title`, the chunk as paragraph. Hashes of names decide all choices, so the same Python version
always gives the same questions.
"""

from typing import Any

from glimmer_jax.pydocs import clauses, corpus, signatures

TASKS = ("which_function", "slot_filling", "fact_verification")
# Relative frequencies in training mixtures; 1 for other tasks. `which_function` is learned first, and
# the start checkpoint already practised it.
SHARES = {"which_function": 0.5}
# Which function: maximum number of questions per page and per sentence. Training pages have more,
# because a model memorises questions that it sees often.
QUESTIONS = {"train": (32, 8), "dev": (4, 3), "test": (4, 3)}

Example = dict[str, Any]


def all_tasks() -> dict[tuple[str, str], list[Example]]:
    """Examples by (task, split), each list in pseudo-random order."""
    pages = corpus.pages()
    by_task = {
        "which_function": which_function(pages),
        "slot_filling": slot_filling(pages),
        "fact_verification": fact_verification(pages),
    }
    by_split: dict[tuple[str, str], list[Example]] = {}
    for task, rows in by_task.items():
        for split in corpus.SPLITS:
            examples = [example for row_split, example in rows if row_split == split]
            examples.sort(key=lambda example: corpus.stable_hash("order", example["id"]))
            by_split[task, split] = examples
    return by_split


def which_function(pages: tuple[corpus.Page, ...]) -> list[tuple[str, Example]]:
    """(split, example) pairs: the question is a clause of a docstring, the answer the object's name.

    `{"input": "formatted stream to file-like object", "output": [{"answer": "json.dump", …}]}`
    """
    examples = []
    index = clauses.ClauseIndex(pages)
    for page in pages:
        if page.documented.kind not in ("function", "class", "property"):
            continue
        common = clauses.common_clauses(page, index, *QUESTIONS[page.split])
        for number, (chunk, clause) in enumerate(common):
            examples.append(_example("which_function", page, number, clause, page.name, chunk))
    return examples


def slot_filling(pages: tuple[corpus.Page, ...]) -> list[tuple[str, Example]]:
    """(split, example) pairs: `json.dumps [SEP] default of indent` -> `None`."""
    examples = []
    for page in pages:
        for number, slot in enumerate(signatures.slots(page)):
            question = f"{page.name} [SEP] {slot.relation}"
            examples.append(_example("slot_filling", page, number, question, slot.value, 0))
    return examples


def fact_verification(pages: tuple[corpus.Page, ...]) -> list[tuple[str, Example]]:
    """(split, example) pairs: claims on signatures and docstrings -> SUPPORTS or REFUTES, balanced.

    Claims come in pairs of siblings with exchanged details. Each subject and each detail occurs
    once in a true claim and once in a false one, so neither alone reveals the answer.
    """
    examples = []
    for pair in signatures.signature_pairs(pages) + clauses.clause_pairs(pages):
        for page, claim, chunk, truth in pair:
            answer = "SUPPORTS" if truth else "REFUTES"
            number = corpus.stable_hash(claim) % 10**8
            examples.append(_example("fact_verification", page, number, claim, answer, chunk))
    return examples


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
