"""Published corpora by the documented commands, on small files of the same form."""

import gzip
import json
import pathlib
import shlex

import gin
import pytest

from glimmer_jax import main as command_line
from glimmer_jax import shipped
from glimmer_jax.corpus.passages import Passages
from glimmer_jax.vocabulary import PYDOCS_MODEL
from tests.vocabularies import SPECIAL_IDS, train_sentencepiece

PAGES = [
    {
        "_id": "10979",
        "wikipedia_id": "10979",
        "wikipedia_title": "Emma",
        "text": ["Emma\n", "Emma is a novel.\n", "Section::::Plot.\n", "word " * 300 + "\n"],
        "anchors": [{"text": "novel", "href": "Novel", "paragraph_id": 1, "start": 10, "end": 15}],
        "categories": "Novels",
        "history": {"revid": 1, "pre_dump": True},
        "sources": [],
    },
    {"_id": "7", "wikipedia_id": "7", "wikipedia_title": "No text", "text": ["No text\n"]},
]
DPR = 'id\ttext\ttitle\n1\t"The ""Emma"" of 1815"\tEmma\n2\tplain\tOther\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    gin.clear_config()


def run(*files, **macros):
    flags = [f"--gin_file=gin/{file}.gin" for file in files]
    macros = {"VOCABULARY": "pydocs", **macros}
    flags += [f"--gin.{name}={value!r}" for name, value in macros.items()]
    return command_line.main(["--run_mode=passages", *flags])


def write(path, data):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_bytes(data)


def test_the_kilt_example_cuts_pages_into_sections(capsys):
    data = "".join(json.dumps(page) + "\n" for page in PAGES).encode()
    write("data/kilt/kilt_knowledgesource.json", data)
    assert run("examples/kilt_passages") == 0
    records = list(Passages.open("data/kilt/passages").records())
    assert [len(one["text"].split()) for one in records] == [4, 200, 102]
    assert [one["paragraphs"] for one in records] == [[1, 1], [3, 3], [3, 3]]
    assert records[2]["text"].startswith("Plot. word") and records[2]["page"] == "10979"
    shown = capsys.readouterr().out
    assert "2 lines, 2 documents, 3 passages, 1 without text dropped." in shown
    assert "0 were truncated at 304 tokens; 0 tokens are unknown" in shown
    # The same from a packed file, by a pattern, in passages of another length.
    write("packed/a.json.gz", gzip.compress(data))
    macros = {"CORPUS": "packed/*.gz", "PASSAGE_WORDS": 100, "PASSAGES_DIR": "p"}
    assert run("examples/kilt_passages", **macros) == 0
    assert len(Passages.open("p")) == 5


def test_the_documented_commands_run_as_they_stand():
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write("data/kilt/kilt_knowledgesource.json", json.dumps(PAGES[0]).encode())
    write("data/dpr/psgs_w100.tsv.gz", gzip.compress(DPR.encode()))
    write("data/t5/spiece.model", PYDOCS_MODEL.read_bytes())
    pathlib.Path("data/corpus").mkdir()
    for name, number in (("a", 1), ("b", 2)):
        rows = {"id": [number], "title": ["t"], "text": ["word " * (100 * number)]}
        parquet.write_table(pyarrow.table(rows), f"data/corpus/{name}.parquet")
    text = (pathlib.Path(shipped.root()) / "docs" / "kilt.md").read_text(encoding="utf-8")
    block = text.partition("\n## Corpus\n")[2].split("```sh\n")[1].split("```")[0]
    commands = [line for line in block.replace("\\\n", "").splitlines() if line[0] != "#"]
    for command in commands:
        name, *flags = shlex.split(command)
        assert name == "glimmer" and command_line.main(flags) == 0
        gin.clear_config()
    folders = ("data/kilt/passages", "data/dpr/passages", "data/own_passages")
    assert [len(Passages.open(folder)) for folder in folders] == [3, 2, 3]


def test_the_dpr_example_keeps_dprs_ids():
    write("data/dpr/psgs_w100.tsv.gz", gzip.compress(DPR.encode()))
    assert run("examples/dpr_passages") == 0
    assert list(Passages.open("data/dpr/passages").records()) == [
        {"id": 1, "title": "Emma", "text": 'The "Emma" of 1815'},
        {"id": 2, "title": "Other", "text": "plain"},
    ]


@pytest.mark.parametrize(
    "macros, message",
    [
        ({"CORPUS": "*.jsonl"}, r"no file matches *.jsonl"),
        ({"CORPUS": "bad", "CORPUS_FORMAT": "kilt", "PASSAGE_WORDS": 9}, "bad:2: byte "),
        ({"CORPUS": "bad", "CORPUS_FORMAT": "kilt"}, "PASSAGE_WORDS must be set"),
        ({"CORPUS": "bad", "BEAM_OPTIONS": ""}, "CORPUS_DIR"),
        ({"CORPUS": "bad", "PASSAGES_DIR": "."}, ". exists already"),
    ],
)
def test_bad_input_leaves_nothing_behind(capsys, macros, message):
    write("bad", json.dumps(PAGES[0]).encode() + b"\n{")
    assert run("runs/passages", **{"PASSAGES_DIR": "p", **macros}) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in pathlib.Path().iterdir()] == ["bad"]


def test_invalid_lines_are_skipped_on_request(capsys):
    write("bad", json.dumps(PAGES[0]).encode() + b"\n{")
    macros = {"CORPUS": "bad", "CORPUS_FORMAT": "kilt", "PASSAGE_WORDS": 200, "ON_ERROR": "skip"}
    assert run("runs/passages", PASSAGES_DIR="p", **macros) == 0
    assert "1 invalid lines skipped.\n  bad:2: byte" in capsys.readouterr().out
    assert len(Passages.open("p")) == 3


@pytest.mark.filterwarnings("ignore")  # Of Beam's own making.
def test_beam_and_one_process_write_the_same_folder():
    pytest.importorskip("apache_beam")
    write("k.json", "".join(json.dumps(page) + "\n" for page in PAGES).encode())
    macros = {"CORPUS": "k.json", "CORPUS_FORMAT": "kilt", "PASSAGE_WORDS": 100}
    assert run("runs/passages", PASSAGES_DIR="one", **macros) == 0
    beam = {"CORPUS_DIR": "shards", "BEAM_OPTIONS": "--runner=DirectRunner"}
    assert run("runs/passages", PASSAGES_DIR="many", **macros, **beam) == 0
    for path in pathlib.Path("one").iterdir():
        assert path.read_bytes() == pathlib.Path("many", path.name).read_bytes()
    macros = {"CORPUS": "shards/*.jsonl", "PASSAGES_DIR": "again"}
    assert run("runs/passages", **macros) == 0
    assert len(Passages.open("again")) == 5


def sentencepiece_model(path, **settings):
    """A model of lower-case English letters, without byte fallback."""
    lines = [f"word{i} brown fox {i * 37 % 101} over {chr(97 + i % 26) * 3}" for i in range(500)]
    train_sentencepiece(path, lines, vocab_size=100, **settings)


def test_unknown_tokens_are_counted_and_many_get_a_warning(capsys, caplog):
    sentencepiece_model("t5.model", **SPECIAL_IDS)
    # "title:" and "context:" have two more.
    text = "brown fox " * 200
    write("few.jsonl", json.dumps({"id": 1, "title": "", "text": text + "{"}).encode())
    write("many.jsonl", json.dumps({"id": 1, "title": "", "text": text + "{ " * 50}).encode())
    for name, shown in (("few", "; 3 tokens are unknown"), ("many", "; 52 tokens are unknown")):
        macros = {"CORPUS": f"{name}.jsonl", "PASSAGES_DIR": name, "VOCABULARY": "t5.model"}
        assert run("runs/passages", MAX_PASSAGE_TOKENS=5000, **macros) == 0
        assert shown in capsys.readouterr().out
    (record,) = [one for one in caplog.records if one.levelname == "WARNING"]
    assert "tokens of many are unknown to t5.model" in record.getMessage()


def test_a_vocabulary_with_other_special_ids_is_rejected_early(capsys):
    sentencepiece_model("own.model")
    write("bad", b"{")
    assert run("runs/passages", CORPUS="bad", PASSAGES_DIR="p", VOCABULARY="own.model") == 2
    shown = capsys.readouterr().err
    assert "own.model must have pad_id=0" in shown
    assert "got pad_id=-1, eos_id=2 and unk_id=0" in shown and "SentencePieceTrainer" in shown


def test_string_ids_are_kept_and_compressed_corpora_read():
    rows = [{"id": f"doc-{i}", "title": "t", "text": "x"} for i in (2, 1)]
    write("c.jsonl.gz", gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert run("runs/passages", CORPUS="c.jsonl.gz", PASSAGES_DIR="p") == 0
    passages = Passages.open("p")
    assert [one["id"] for one in passages.records()] == ["doc-2", "doc-1"]
    assert passages.rows_of(["doc-1", "doc-2"]).tolist() == [1, 0]
    with pytest.raises(ValueError, match="1 passage ids .* p: doc-3"):
        passages.rows_of(["doc-3"])
