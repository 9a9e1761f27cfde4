"""Settings of an earlier run in the same folder."""

from glimmer_jax.modes import checks

SAVED = """\
import something

# Macros:
# ==============================================================================
EVAL_OUTPUT_DIR = 'a'
LEARNING_RATE = 0.001
QUESTIONS = \\
    {'a': 1,
     'b': 2}

# Parameters for evaluate.evaluate:
# ==============================================================================
evaluate.evaluate.num_examples = 10
"""


def changed(tmp_path, *replacements):
    (tmp_path / "config.gin").write_text(SAVED)
    text = SAVED
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return checks.changed_settings(str(tmp_path), text)


def test_every_changed_added_and_removed_binding_is_named(tmp_path):
    assert changed(
        tmp_path,
        ("0.001", "0.0002"),
        ("'b': 2", "'b': 3"),
        ("evaluate.evaluate.num_examples = 10", "evaluate.evaluate.seed = 0"),
    ) == [
        "LEARNING_RATE: 0.001 -> 0.0002",
        "QUESTIONS: {'a': 1, 'b': 2} -> {'a': 1, 'b': 3}",
        "evaluate.evaluate.num_examples: 10 -> unset",
        "evaluate.evaluate.seed: unset -> 0",
    ]


def test_another_layout_or_place_is_no_change(tmp_path):
    moved = ("EVAL_OUTPUT_DIR = 'a'", "EVAL_OUTPUT_DIR = 'b'")
    wrapped = ("LEARNING_RATE = 0.001", "LEARNING_RATE = \\\n    0.001")
    assert changed(tmp_path, moved, wrapped, ("import something", "import other")) == []


def test_nothing_has_changed_in_a_new_folder_or_without_gin(tmp_path):
    assert checks.changed_settings(str(tmp_path / "new"), SAVED) == []
    (tmp_path / "config.gin").write_text(SAVED)
    assert checks.changed_settings(str(tmp_path), "") == []
