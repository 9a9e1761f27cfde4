"""The documentation's links, paths, macros, modes, commands and imports are those of the code."""

import ast
import importlib
import re
import shlex

import pytest

from glimmer_jax import configuration, main
from glimmer_jax.modes import preflight
from tests.pages import NEEDS, ROOT, blocks, read

PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "glimmer_jax" / "checkpoints" / "README.md",
]
FOLDERS = (
    "benchmarks",
    "docs",
    "examples",
    "experiments",
    "gin",
    "glimmer_jax",
    "launch",
    "tasks",
    "tests",
)
GIN_TEXTS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "gin").rglob("*.gin")}
MACROS = {
    name
    for text in GIN_TEXTS.values()
    for name in re.findall(r"^([A-Z][A-Z0-9_]+) =|%([A-Z][A-Z0-9_]+)", text, re.MULTILINE)
    for name in name
    if name
}
# Identifiers in code spans that are not macros.
VARIABLES = {
    "GLIMMER_CACHE",
    "GLIMMER_SERVE_TOKEN",
    "GLIMMER_TEST_PLATFORM",
    "JAX_COMPILATION_CACHE_DIR",
    "XLA_FLAGS",
}
NOT_MACROS = {"ALREADY_EXISTS", "FAILED", "NOT_FOUND", "RESOURCE_EXHAUSTED", "SIGKILL", "SIGTERM"}
NOT_MACROS |= {
    "GLIMMER",
    "LUMEN",
    "IMAGE",
    "MACRO",
    "NAME",
    "NAMES",
    "REFUTES",
    "SUPPORTS",
    "START_ENT",
    "END_ENT",
}
LANGUAGES = {"sh", "python", "text", "json", "dockerfile"}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def without_blocks(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(read(page)), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_relative_links_and_anchors_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(read(page))):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(linked), f"{target}: no such heading"


@pages
def test_paths_and_modules_exist(page):
    text = read(page)
    for path in re.findall(
        rf"(?<![\w/.$-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w/?)(?![\w./-]*\*)", text
    ):
        candidates = (ROOT / path, page.parent / path)
        assert any(candidate.exists() for candidate in candidates), path
    for module in re.findall(rf"python -m ((?:{'|'.join(FOLDERS)})[\w.]*\w)", text):
        assert importlib.util.find_spec(module), module


@pages
def test_macros_exist(page):
    text = read(page)
    given = re.findall(r"--gin\.([A-Z][A-Z0-9_]+)=", text)
    spans = re.findall(r"`([^`\n]+)`", without_blocks(text))
    named = [name for span in spans for name in re.findall(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b", span)]
    heads = [match[1] for span in spans if (match := re.match(r"([A-Z][A-Z0-9_]+)(?: ?=|$)", span))]
    for name in {*given, *named, *heads} - VARIABLES - NOT_MACROS:
        # MESH_* and MESH_ stand for several.
        assert name in MACROS or (name.endswith("_") and name[:-1] in str(MACROS)), name


@pages
def test_modes_and_actions_exist(page):
    text = read(page)
    modes = {*main.MODES, main.PREFLIGHT, "MODE"}
    assert set(re.findall(r"--run_mode=(\w+)", text)) <= modes
    actions = set(re.findall(r"--action=(\w+)", text))
    assert actions <= {"plan", "inspect", "verify", "repair", "append", "withdraw", "merge"}


def test_configuration_lists_every_mode():
    row = re.search(
        r"^\| `--run_mode` \|.*$", read(ROOT / "docs" / "configuration.md"), re.MULTILINE
    )
    modes = {*main.MODES, main.PREFLIGHT}
    assert modes <= set(re.findall(r"`(\w+)`", row[0]))


@pages
def test_blocks_have_a_language_and_known_needs(page):
    opened = re.findall(r"^```(.*)$", read(page), re.MULTILINE)[::2]
    assert len(opened) == len(list(blocks(page)))
    for language, needs, text in blocks(page):
        assert language in LANGUAGES, text
        assert not needs or set(needs.split(", ")) <= NEEDS.keys(), needs
        if language == "sh":
            assert "..." not in text and "…" not in text, f"incomplete command: {text}"
            if needs is None:
                placeholders = re.findall(r"(?<![\w.$])(?:NAME|ZONE|BUCKET|PROJECT|DIR)\b", text)
                assert not placeholders, f"{placeholders} in a block that needs nothing"
            if re.search(r"^make |pip install|git clone|curl ", text, re.MULTILINE):
                # Otherwise tests/docs_run_test.py would download it.
                assert needs and set(needs.split(", ")) & {"beam", "download", "server", "slurm"}, (
                    text
                )


@pages
def test_python_blocks_parse_and_import_names_that_exist(page):
    for language, _, text in blocks(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in FOLDERS:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    is_package = hasattr(module, "__path__")
                    submodule = importlib.util.find_spec(name) if is_package else None
                    assert hasattr(module, alias.name) or submodule, name


@pages
def test_prose_is_wrapped_at_100_columns(page):
    lines = without_blocks(read(page)).splitlines()
    long = [line for line in lines if len(line) > 100 and not line.startswith(("|", "!["))]
    assert not long


def commands(page):
    """Arguments of each `glimmer` command in the page's shell blocks, variables replaced."""
    variables = {}
    for language, _, text in blocks(page):
        if language != "sh":
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            if assigned := re.fullmatch(r"(\w+)=(.*)", words[0]):
                variables[assigned[1]] = assigned[2]
                continue
            arguments = []
            for word in words:
                # An unquoted variable alone is split at its spaces, as the shell does it.
                whole = re.fullmatch(r"\$(\w+)", word)
                arguments += variables[whole[1]].split() if whole else [word]
            if "launch" in words:
                yield arguments[arguments.index("--") + 1 :]
            elif words[0] == "glimmer":
                yield arguments[1:]


COMMANDS = [
    pytest.param(arguments, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, arguments in enumerate(commands(page))
]


@pytest.mark.parametrize("arguments", COMMANDS)
def test_commands_configure_their_mode(arguments):
    flags = main.parse_flags(arguments)
    if main.official_arguments(flags):
        return
    unbound = preflight.UNBOUND if flags.run_mode == main.PREFLIGHT else None
    configuration.parse(flags.gin_file, flags.gin_bindings, (), unbound)
    modes = preflight.JOBS if flags.run_mode == main.PREFLIGHT else (flags.run_mode,)
    for mode in modes:
        module, name = main.MODES[mode].function.split(":")
        try:
            configuration.configured(getattr(importlib.import_module(module), name))
            return
        except configuration.ConfigError:
            continue
    pytest.fail(f"the gin files configure none of {modes}")


def test_commands_are_found_on_every_page_that_has_them():
    with_commands = {page.stem for page in PAGES if any(commands(page))}
    assert with_commands >= {"tutorial", "kilt", "memory", "serving", "weights", "launching", "t5x"}


def test_t5x_commands_give_what_their_run_files_require():
    text = read(ROOT / "docs" / "t5x.md")
    for name in ("finetune", "eval", "infer"):
        header = GIN_TEXTS[ROOT / "gin" / "t5x" / f"{name}.gin"].split("\nfrom ")[0]
        required = re.sub(r"\(.*?\)", "", header.partition("# Requires:")[2], flags=re.DOTALL)
        for macro in re.findall(r"\b[A-Z][A-Z0-9_]+\b", required):
            assert macro == "MODEL" or f"--gin.{macro}=" in text, f"{name}: {macro}"


def test_ci_runs_the_ci_script_on_the_oldest_supported_python():
    workflow = read(ROOT / ".github" / "workflows" / "ci.yml")
    oldest = re.search(r'python_requires=">=([\d.]+)"', read(ROOT / "setup.py"))[1]
    assert "run: bash .ci/run" in workflow and (ROOT / ".ci" / "run").is_file()
    assert f'"{oldest}"' in workflow


@pytest.mark.parametrize("name", ["FiD", "LUMEN", "GLIMMER"])
def test_the_readme_has_the_model_cards_results(name):
    def row(page, pattern):
        (line,) = re.findall(rf"^\| {pattern} .*$", read(page), re.MULTILINE)
        return [cell.strip() for cell in line.strip("|").split("|")]

    card = ROOT / "glimmer_jax" / "checkpoints" / "README.md"
    quality, cost = row(card, f"{name}, test")[1], row(card, rf"{name} \|")[5]
    assert row(ROOT / "README.md", name)[-2:] == [quality, cost]
