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
    ],
)
def test_published_names_say_task_and_split(path, name):
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
    found = files.find(f"{tmp_path}/*/*.parquet")
    assert found == {
        "nq-test.jsonl": [tmp_path / "nq/test-00000-of-00001.parquet"],
        "trex-train.jsonl": [tmp_path / name for name in names],
    }
    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match="comes in 3 Parquet files, and 2 of them are here"):
        files.find(f"{tmp_path}/*/*.parquet")


def test_files_that_cannot_be_told_apart_are_refused(tmp_path):
    touch(tmp_path, "nq-dev-kilt.jsonl", "nq-dev.jsonl")
    with pytest.raises(ValueError, match=r"nq-dev\.jsonl are both nq-dev.jsonl. Keep one"):
        files.find(f"{tmp_path}/*.jsonl")
    touch(tmp_path, "part.parquet")
    with pytest.raises(ValueError, match="part.parquet: wanted the names of the hub"):
        files.find(f"{tmp_path}/*.parquet")
    with pytest.raises(ValueError, match="No file matches"):
        files.find(f"{tmp_path}/*.json")
