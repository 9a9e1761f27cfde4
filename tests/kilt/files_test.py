import os

import pytest

from glimmer_jax.kilt import files
from tests import mini_kilt


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("kilt/nq-train-kilt.jsonl", "nq-train.jsonl"),
        ("structured_zeroshot-dev-kilt.jsonl", "structured_zeroshot-dev.jsonl"),
        ("fever-test_without_answers-kilt.jsonl", "fever-test.jsonl"),
        ("triviaqa-train_id-kilt.jsonl", "triviaqa-train.jsonl"),
        ("triviaqa-test_id_without_answers-kilt.jsonl", "triviaqa-test.jsonl"),
        # KILT's own script writes the questions into files of these names.
        ("triviaqa-dev-kilt.jsonl", "triviaqa-dev.jsonl"),
        ("kilt_tasks/trex/train-00001-of-00003.parquet", "trex-train.jsonl"),
        ("triviaqa_support_only/validation-00000-of-00001.parquet", "triviaqa-dev.jsonl"),
        ("which_function-train.jsonl", "which_function-train.jsonl"),
        ("which_function-train.jsonl.gz", "which_function-train.jsonl"),
        ("nq-dev-kilt.jsonl.gz", "nq-dev.jsonl"),
    ],
)
def test_published_names_determine_task_and_split(path, name):
    assert files.task_file(path) == name


def test_sizes_are_those_of_files_that_there_are():
    assert len(files.TASKS) == 11 and set(files.TASKS) == set(mini_kilt.TASKS)
    assert [name for name, task in files.TASKS.items() if "train" not in task.sizes] == [
        "wned",
        "cweb",
    ]
    # arXiv 2306.10231's six.
    six = ("nq", "triviaqa", "hotpotqa", "fever", "structured_zeroshot", "trex")
    assert sum(files.TASKS[name].sizes["train"] for name in six) == 2_775_128


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")


def test_parquet_parts_are_one_file_in_order(tmp_path):
    names = [f"trex/train-0000{n}-of-00003.parquet" for n in range(3)]
    touch(tmp_path, *names, "nq/test-00000-of-00001.parquet")
    found = files.find_files(f"{tmp_path}/*/*.parquet")
    assert found == {
        "nq-test.jsonl": [tmp_path / "nq/test-00000-of-00001.parquet"],
        "trex-train.jsonl": [tmp_path / name for name in names],
    }
    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match="trex-train.jsonl has 3 Parquet files, found 2"):
        files.find_files(f"{tmp_path}/*/*.parquet")


def test_an_id_in_two_parts_is_rejected(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    paths = [tmp_path / f"train-0000{n}-of-00002.parquet" for n in range(2)]
    for path in paths:
        row = {"id": "a", "input": "who", "output": [{"answer": "x"}]}
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    with pytest.raises(ValueError, match="00001-of-00002.*repeats the id 'a'.*trex-train.jsonl"):
        list(files.read_task("trex-train.jsonl", paths))


def test_two_files_of_one_split_are_rejected(tmp_path):
    touch(tmp_path, "nq-dev-kilt.jsonl", "nq-dev.jsonl")
    with pytest.raises(ValueError, match=r"nq-dev\.jsonl .*both nq-dev\.jsonl"):
        files.find_files(f"{tmp_path}/*.jsonl")
    touch(tmp_path, "part.parquet")
    with pytest.raises(ValueError, match="part.parquet: .*Rename"):
        files.find_files(f"{tmp_path}/*.parquet")
    with pytest.raises(ValueError, match="QUESTIONS: no file matches"):
        files.find_files(f"{tmp_path}/*.json")


def test_a_path_with_brackets_is_itself(tmp_path):
    touch(tmp_path, "br[1]/nq-dev.jsonl")
    found = files.find_files(f"{tmp_path}/br[1]/nq-dev.jsonl")
    assert found == {"nq-dev.jsonl": [tmp_path / "br[1]/nq-dev.jsonl"]}


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("whichword-valid.jsonl", "to whichword-dev.jsonl"),
        ("whichword_train.jsonl", "to whichword-train.jsonl"),
        ("whichword.jsonl", ""),
    ],
)
def test_names_without_a_split_get_a_warning(tmp_path, caplog, name, better):
    touch(tmp_path, "nq-dev.jsonl", name)
    assert set(files.find_files(f"{tmp_path}/*")) == {"nq-dev.jsonl", name}
    (record,) = caplog.records
    assert f"{name} is not named <task>-<train|dev|test>.jsonl" in record.getMessage()
    assert better in record.getMessage()


def test_pipes_are_rejected_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "nq-dev.jsonl")
    with pytest.raises(ValueError, match="nq-dev.jsonl .*regular file"):
        files.find_files(f"{tmp_path}/*")


MENTION = "a b c [START_ENT] M N [END_ENT] x y z"


@pytest.mark.parametrize(
    ("words", "short"),
    [
        (10, MENTION),
        (8, "b c [START_ENT] M N [END_ENT] x y"),
        (4, "[START_ENT] M N [END_ENT]"),
        (1, "[START_ENT] M N [END_ENT]"),
    ],
)
def test_long_contexts_are_cut_around_their_mention(words, short):
    assert files.shorten(MENTION, words) == short


def test_a_mention_at_an_end_gets_the_other_sides_words():
    assert files.shorten("[START_ENT] M [END_ENT] v w x y z", 6) == "[START_ENT] M [END_ENT] v w x"
    assert files.shorten("v w x y z [START_ENT] M [END_ENT]", 6) == "x y z [START_ENT] M [END_ENT]"
    assert files.shorten("a b [START_ENT] M c", 3) == "b [START_ENT] M"


def test_dialogues_keep_their_end_and_questions_all_words():
    assert files.shorten("one two\nthree four", 2, dialogue=True) == "three four"
    assert files.shorten("one two\nthree four", 2) == "one two\nthree four"
