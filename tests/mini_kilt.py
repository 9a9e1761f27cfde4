"""A miniature of KILT: invented towns and every one of the eleven tasks, in the official formats.

    kilt_knowledgesource.json   pages as KILT's knowledge source has them
    questions/*-kilt.jsonl      all 31 published files, under their names
    triviaqa/wikipedia-*.json   the questions of the TriviaQA files, as TriviaQA has them

Every town has a page of the same five paragraphs, so that words alone find the right one; three of them
have text, and in passages of `PASSAGE_WORDS` words each has one of its own. What KILT does in places is
done here: TriviaQA without questions, test files without answers, outputs without an answer or without
provenance, evidence that was not found (-1), numbers for ids.
"""

import json

TOWNS = ("Orvale", "Brimsted", "Quenlow", "Tarnholt", "Ysmere", "Dunwick")
RIVERS = ("Sente", "Marl", "Ilvane", "Koth", "Pell", "Anrow")
GOODS = ("blue glass", "salt fish", "tin bells", "rye paper", "oak barrels", "wool hats")
SPLITS = ("train", "dev", "test_without_answers")
PASSAGE_WORDS = 12
NO_TRAIN = ("wned", "cweb")
TASKS = (
    *("fever", "aidayago2", "wned", "cweb", "trex", "structured_zeroshot"),
    *("nq", "hotpotqa", "triviaqa", "eli5", "wow"),
)


def pages():
    for number, (town, river, good) in enumerate(zip(TOWNS, RIVERS, GOODS, strict=True)):
        text = [
            f"{town}\n",
            f"{town} is a town on the river {river}, founded in {1200 + number}.\n",
            "Section::::Economy.\n",
            f"The mill of {town} makes {good}.\n",
            f"BULLET::::- Fair of {town}, every spring.\n",
        ]
        yield {
            "_id": str(7000 + number),
            "wikipedia_id": str(7000 + number),
            "wikipedia_title": town,
            "text": text,
            "anchors": [],
            "categories": "Towns",
            "history": {"url": f"https://example.org/{town}"},
        }


def evidence(town, paragraph=None, bleu=1.0):
    found = {"wikipedia_id": str(7000 + TOWNS.index(town)), "title": town}
    if paragraph is None:
        return found
    spans = {"start_paragraph_id": paragraph, "end_paragraph_id": paragraph}
    return {**found, **spans, "start_character": 0, "end_character": 9, "bleu_score": bleu}


def example(task, town, river, good, other):
    """(input, output) of a task on a town; `other` is a town that it is not."""
    where, what = [evidence(town, 1)], [evidence(town, 3)]
    if task == "fever":
        return f"{town} lies on the river {river}.", [{"answer": "SUPPORTS", "provenance": where}]
    if task in ("aidayago2", "wned", "cweb"):
        text = f"{'word ' * 40}went to [START_ENT] {town} [END_ENT] by the {river} {'word ' * 40}"
        return text.strip(), [{"answer": town, "provenance": [evidence(town)]}]
    if task in ("trex", "structured_zeroshot"):
        return f"{town} [SEP] product", [{"answer": good, "provenance": what}]
    if task == "nq":
        # An answer without provenance, evidence without an answer, and an answer found badly.
        return f"what does the mill of {town} make", [
            {"answer": good, "provenance": what},
            {"answer": f"the {good}", "provenance": []},
            {"answer": "nothing", "provenance": [evidence(other, 3, bleu=0.2)]},
            {"provenance": [{**evidence(town, 3), "meta": {"evidence_span": [good]}}]},
        ]
    if task == "hotpotqa":
        lost = {**evidence(town, 1), "start_paragraph_id": -1, "end_paragraph_id": -1}
        return f"Which river is {town} on, and is {other} on it?", [
            {"answer": river, "provenance": [lost, evidence(other, 1)]}
        ]
    if task == "triviaqa":
        return f"Which town makes {good}?", [{"answer": town, "provenance": what}]
    if task == "eli5":
        return f"why does {town} make {good}", [
            {"answer": f"{town} has a mill, and it makes {good}.", "meta": {"score": 3}},
            {"provenance": what},
        ]
    return f"Hello!\nI am off to {town}.\nWhat do they make there?", [
        {"answer": f"They make {good} in {town}.", "provenance": what}
    ]


def lines(task, split):
    for number, (town, river, good) in enumerate(zip(TOWNS, RIVERS, GOODS, strict=True)):
        other = TOWNS[(number + 1) % len(TOWNS)]
        question, output = example(task, town, river, good, other)
        line = {
            "id": f"{task}_{split[:4]}_{number}",
            "input": question,
            "output": output,
            "meta": {},
        }
        if task == "fever":
            line["id"] = {"trai": 0, "dev": 100, "test": 200}[split[:4]] + number
            if number % 2:
                line["input"] = f"{town} lies on the river {RIVERS[number - 1]}."
                output[0]["answer"] = "REFUTES"
        if task == "triviaqa":
            line["input"] = ""
        if split == "test_without_answers":
            del line["output"]
        yield line


def file_name(task, split):
    """As published."""
    if task == "triviaqa":
        split = {"test_without_answers": "test_id_without_answers"}.get(split, f"{split}_id")
    return f"{task}-{split}-kilt.jsonl"


def write(folder):
    """Writes all files into a folder."""
    (folder / "questions").mkdir(parents=True)
    (folder / "triviaqa").mkdir()
    write_lines(folder / "kilt_knowledgesource.json", pages())
    for task in TASKS:
        for split in SPLITS:
            if task in NO_TRAIN and split == "train":
                continue
            write_lines(folder / "questions" / file_name(task, split), lines(task, split))
    for split in SPLITS:
        rows = [
            {
                "QuestionId": f"triviaqa_{split[:4]}_{number}",
                "Question": f"Which town makes {good}?",
            }
            for number, good in enumerate(GOODS)
        ]
        path = folder / "triviaqa" / f"wikipedia-{split.replace('_', '-')}.json"
        path.write_text(json.dumps({"Data": rows, "Version": 1.0}))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
