"""The command line: `glimmer --run_mode=MODE --gin_file=... --gin.NAME=VALUE`.

Flags are T5X's. KILT's official scores take flags instead of gin, since they need two files only:
`--run_mode=score --gold=FILE --guess=FILE [--ks=1,5,10,20]`. Exit codes: 0: done; 2: invalid input,
do not retry; 42: preempted, safe to retry; 1: a bug; 130: Ctrl-C.
"""

import argparse
import importlib
import inspect
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from glimmer_jax.runtime import compilation_cache, ending, exit_codes
from glimmer_jax.runtime.host_memory import keep_freed_memory
from glimmer_jax.runtime.preemption import STOP, StopRequested, stop_signals


class Mode(NamedTuple):
    """A run mode: a function that gin configures, imported when the mode runs."""

    function: str  # "module:name"
    gin_file: str
    summary: str
    many_processes: bool = False  # all processes of a job run it together


MODES = {
    "passages": Mode(
        "glimmer_jax.modes.passages:passages", "gin/runs/passages.gin", "tokenize a corpus once"
    ),
    "retrieve": Mode(
        "glimmer_jax.modes.retrieve:retrieve",
        "gin/runs/retrieve.gin",
        "retrieve passages for questions, by BM25, a dense encoder or both",
        many_processes=True,
    ),
    "cache": Mode(
        "glimmer_jax.modes.cache:cache_tasks",
        "gin/runs/cache.gin",
        "write seqio's caches of tasks over large retrieved files",
    ),
    "train": Mode(
        "glimmer_jax.modes.train:train",
        "gin/runs/finetune.gin",
        "train FiD, LUMEN or GLIMMER; from random parameters with gin/runs/pretrain.gin",
        many_processes=True,
    ),
    "codebooks": Mode(
        "glimmer_jax.modes.codebooks:learn_codebooks",
        "gin/runs/codebooks.gin",
        "learn the codebooks of a product-quantised memory",
        many_processes=True,
    ),
    "build_memory": Mode(
        "glimmer_jax.modes.build_memory:build_memory",
        "gin/runs/build_memory.gin",
        "encode a corpus into a memory store",
        many_processes=True,
    ),
    "memory": Mode(
        "glimmer_jax.modes.memory:memory",
        "gin/runs/memory.gin",
        "plan, inspect, verify, repair, append to, withdraw from or merge memory stores (--action)",
    ),
    "eval": Mode(
        "glimmer_jax.modes.evaluate:evaluate",
        "gin/runs/eval.gin",
        "metrics and predictions on held-out questions",
        many_processes=True,
    ),
    "infer": Mode(
        "glimmer_jax.modes.infer:infer",
        "gin/runs/infer.gin",
        "answer the questions of a file, or of the prompt",
        many_processes=True,
    ),
    "serve": Mode(
        "glimmer_jax.modes.serve:serve",
        "gin/runs/serve.gin",
        "answer questions over HTTP, with a page to ask them",
    ),
    "score": Mode(
        "glimmer_jax.modes.score:score",
        "gin/runs/score.gin",
        "metrics of a prediction file; KILT's official scores with --gold and --guess",
    ),
    "export": Mode(
        "glimmer_jax.modes.export:export",
        "gin/runs/export.gin",
        "write a checkpoint as one file, for Hugging Face or for T5X; as a program with "
        "gin/runs/export_program.gin",
    ),
}
# Modes that all processes of a job run together. The others reject multi-process launches.
JOBS = tuple(name for name, mode in MODES.items() if mode.many_processes)
# Library -> its name for pip, where they differ.
PACKAGES = {
    "Stemmer": "PyStemmer",
    "gin": "gin-config",
    "google": "protobuf",
    "orbax": "orbax-checkpoint",
    "prometheus_client": "'glimmer-jax[serve]'",
    "starlette": "'glimmer-jax[serve]'",
    "tensorflow_datasets": "tensorflow-datasets",
    "tensorflow_text": "tensorflow-text",
    "uvicorn": "'glimmer-jax[serve]'",
}
# Not configured itself: it reads the settings of another mode.
PREFLIGHT = "preflight"


def _modes_help() -> str:
    lines = [f"  {name:13} {mode.summary}\n{'':16}{mode.gin_file}" for name, mode in MODES.items()]
    lines.append(
        f"  {PREFLIGHT:13} compile another mode for a TPU slice (--topology); nothing runs\n{'':16}"
        "the gin files of that mode"
    )
    return "\n".join(
        [
            "run modes, each with its gin file:",
            *lines,
            "",
            "exit codes: 0: done; 2: invalid input, do not retry; 42: preempted, safe to retry;",
            "1: a bug; 130: Ctrl-C, rerunning resumes.",
            "gin files run code: use only files that you trust.",
        ]
    )


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Flags; every `--gin.NAME=VALUE` becomes the binding `NAME = VALUE`."""
    parser = argparse.ArgumentParser(
        prog="glimmer",
        description="FiD, LUMEN and GLIMMER in JAX. Settings are gin macros: --gin.NAME=VALUE.",
        epilog=_modes_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run_mode",
        choices=[*MODES, PREFLIGHT],
        default="train",
        metavar="MODE",
        help="one of the modes below; train by default",
    )
    parser.add_argument("--action", help="of --run_mode=memory; short for --gin.ACTION")
    parser.add_argument(
        "--gin_file", action="append", default=[], metavar="PATH", help="may be repeated"
    )
    parser.add_argument("--gin_search_paths", default="", metavar="DIR,DIR")
    parser.add_argument("--gin_bindings", action="append", default=[], metavar="X=V")
    parser.add_argument("--seqio_additional_cache_dirs", default="", metavar="DIR,DIR")
    parser.add_argument("--tfds_data_dir", metavar="DIR")
    slices = parser.add_argument_group("whether a job fits a TPU slice (--run_mode=preflight)")
    slices.add_argument("--topology", metavar="GENERATION:SIDES", help="such as v5p:4x4x4")
    slices.add_argument("--json", metavar="FILE", help="gets the report")
    kilt = parser.add_argument_group("KILT's official scores (--run_mode=score, without gin)")
    kilt.add_argument("--gold", metavar="FILE", help="labelled KILT file")
    kilt.add_argument("--guess", metavar="FILE", help="KILT submission")
    kilt.add_argument(
        "--ks", type=_integers, metavar="K,K", help="of precision@k and recall@k; 1,5,10,20"
    )
    job = parser.add_argument_group("jobs of many processes")
    job.add_argument(
        "--distributed",
        action="store_true",
        help="one of many processes; TPU pods and Slurm provide the rest",
    )
    job.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    job.add_argument("--num_processes", type=int, metavar="N")
    job.add_argument("--process_id", type=int, metavar="I", help="from 0 to N - 1")
    parser.add_argument("--debug", action="store_true", help="tracebacks of invalid input")
    flags, others = parser.parse_known_args(argv)
    for other in others:
        name, equals, value = other.removeprefix("--gin.").partition("=")
        if not other.startswith("--gin.") or not equals:
            parser.error(f"unknown argument {other!r}; bindings are written --gin.NAME=VALUE")
        flags.gin_bindings.append(f"{name} = {value}")
    if (flags.topology or flags.json) and flags.run_mode != PREFLIGHT:
        parser.error("--topology and --json need --run_mode=preflight")
    if official_arguments(flags):
        if flags.run_mode != "score" or not flags.gold or not flags.guess:
            parser.error("--gold, --guess and --ks need --run_mode=score and both files")
        if flags.gin_file or flags.gin_bindings:
            parser.error("--gold and --guess take no gin; without them gin/runs/score.gin scores")
    if flags.action is not None:
        flags.gin_bindings.append(f"ACTION = {flags.action!r}")
    return flags


def official_arguments(flags: argparse.Namespace) -> dict[str, Any]:
    """The flags of KILT's official scores that are given."""
    given = {name: getattr(flags, name) for name in ("gold", "guess", "ks")}
    return {name: value for name, value in given.items() if value is not None}


def run_mode(flags: argparse.Namespace) -> Any:
    """Configures the mode's function, with gin or its own flags, and calls it."""
    if arguments := official_arguments(flags):
        return _find("glimmer_jax.modes.score:official")(**arguments)
    if flags.run_mode == PREFLIGHT:
        return _preflight(flags)
    from glimmer_jax import configuration
    from glimmer_jax.storage import lease

    function = _find(MODES[flags.run_mode].function)
    configuration.parse(flags.gin_file, flags.gin_bindings, _paths(flags.gin_search_paths))
    configured = configuration.configured(function)
    # Without the flags of the job, which a restart may change.
    lease.set_command(f"{flags.run_mode}\n{configuration.complete_config()}")
    _set_seqio_dirs(flags)
    kwargs = {}
    if "operative_config" in inspect.signature(function).parameters:
        kwargs["operative_config"] = configuration.operative_config
    return configured(**kwargs)


def _preflight(flags: argparse.Namespace) -> Any:
    import jax

    # The compiler for the slice runs on this machine's CPU. Its accelerators stay unused.
    jax.config.update("jax_platforms", "cpu")
    # A program for an absent slice can be cached, but not be loaded again.
    jax.config.update("jax_enable_compilation_cache", False)
    from glimmer_jax import configuration
    from glimmer_jax.modes import preflight

    search_paths = _paths(flags.gin_search_paths)
    configuration.parse(flags.gin_file, flags.gin_bindings, search_paths, preflight.UNBOUND)
    for job in preflight.JOBS:
        function = _find(MODES[job].function)
        if configuration.configures(function):
            settings = configuration.settings(function)
            return preflight.preflight(job, settings, flags.topology, flags.json)
    raise ValueError(
        f"--gin_file: the files configure none of {', '.join(preflight.JOBS)}. Add the run file of "
        "the job, such as gin/runs/finetune.gin."
    )


def _check_early(flags: argparse.Namespace) -> None:
    """Raises ValueError for settings that can be checked before imports of seconds."""
    if flags.run_mode == PREFLIGHT or not flags.gin_file:
        return
    from glimmer_jax import configuration
    from glimmer_jax.modes import early

    search_paths = _paths(flags.gin_search_paths)
    early.check(configuration.text_macros(flags.gin_file, flags.gin_bindings, search_paths))


def _check_alone(mode: str) -> None:
    """Raises ValueError if many processes would run a single-process mode."""
    import jax

    if mode not in JOBS and jax.process_count() > 1:
        raise ValueError(
            f"--run_mode={mode} is a single-process mode, but this job has {jax.process_count()} "
            "processes. Run it on one machine, without --distributed."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a mode; returns the exit code. Raises errors that nobody foresaw."""
    flags = parse_flags(sys.argv[1:] if argv is None else argv)
    message: object
    with STOP.installed():
        try:
            _check_early(flags)
            from glimmer_jax.runtime.distributed import join

            join(
                flags.distributed, flags.coordinator_address, flags.num_processes, flags.process_id
            )
            _check_alone(flags.run_mode)
            run_mode(flags)
        except StopRequested as stop:
            message, code = stop, STOP.exit_code
        except ModuleNotFoundError as error:
            library = (error.name or "glimmer_jax").split(".")[0]
            if library in ("glimmer_jax", "tasks"):
                raise
            message = (
                f"{library} is not installed, and --run_mode={flags.run_mode} needs it. Install it "
                f"with: pip install {PACKAGES.get(library, library)}"
            )
            print(f"glimmer: {message}", file=sys.stderr)
            return exit_codes.INVALID_INPUT
        except Exception as error:
            if (outcome := _classify(error)) is None:
                raise
            if flags.debug:
                traceback.print_exc()
            message, code = outcome
        else:
            return exit_codes.DONE
        from glimmer_jax.configuration import first_line, name_macros

        print(f"glimmer: {name_macros(first_line(message))}", file=sys.stderr)
        return code


def _classify(error: Exception) -> tuple[object, int] | None:
    """The message for an error and the exit code; None for a bug."""
    from glimmer_jax.modes.early import InvalidSetting

    if isinstance(error, InvalidSetting):
        return error, exit_codes.INVALID_INPUT
    # These import JAX.
    from glimmer_jax.storage import errors
    from glimmer_jax.training.log import NonFiniteError

    if (kind := errors.classify_error(error)) is not None:
        retry = kind == "temporary"
        code = exit_codes.RETRY if retry else exit_codes.INVALID_INPUT
        return errors.describe_error(error), code
    if isinstance(error, (ValueError, FileNotFoundError, NonFiniteError)) and _is_ours(error):
        return error, exit_codes.INVALID_INPUT
    if isinstance(error, MemoryError):
        return (
            f"This machine has too little memory{f': {error}' if str(error) else ''}. Use a larger one, "
            "or smaller settings; a file of a damaged size is a cause, too."
        ), exit_codes.INVALID_INPUT
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
        reason = str(error).splitlines()[0]
        return (
            f"The devices have too little memory: {reason}. Lower BATCH_SIZE, BEAM_SIZE or "
            "TASK_FEATURE_LENGTHS, or use more devices; --run_mode=preflight reports settings that fit."
        ), exit_codes.INVALID_INPUT
    return None


def _is_ours(error: BaseException) -> bool:
    """Whether this project raised it, about its input; what a library raises is a bug of ours."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    module = place.tb_frame.f_globals.get("__name__", "") if place is not None else ""
    return module.split(".")[0] in ("glimmer_jax", "tasks", "launch", "__main__")


def run() -> None:
    """Entry of the `glimmer` script."""
    # Until the handlers are set a signal would end the process without a meaningful exit code.
    signals = stop_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    flags = parse_flags(sys.argv[1:])
    if flags.distributed or flags.coordinator_address is not None:
        from glimmer_jax.runtime.supervisor import work_in_child

        work_in_child(exit_codes.RETRY)
    keep_freed_memory()  # before any thread starts
    ending.install()
    STOP.install()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault(compilation_cache.VARIABLE, compilation_cache.FOLDER)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names and titles may hold what the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("glimmer_jax").setLevel(logging.INFO)
    # seqio's advice about lengths and caches. Errors are raised.
    logging.getLogger("absl").setLevel(logging.ERROR)
    if not flags.debug:
        from glimmer_jax.runtime.filter_stderr import filter_stderr

        filter_stderr()
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output is gone; Python would fail again when it flushes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        print("glimmer: Standard output was closed before the end.", file=sys.stderr)
        code = exit_codes.INVALID_INPUT
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        print(
            "glimmer: This is a bug. Please report it with the lines above and the command.",
            file=sys.stderr,
        )
        code = exit_codes.BUG
    STOP.finish(code)
    if code == exit_codes.DONE:
        ending.end_with(code)
    elif "jax" in sys.modules:
        from glimmer_jax.runtime.distributed import exit_after

        exit_after(code)
    sys.exit(code)


def _integers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers such as 1,5,10, got {text!r}") from None


def _paths(text: str) -> list[str]:
    return [path for path in text.split(",") if path]


def _find(place: str) -> Callable[..., Any]:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def _set_seqio_dirs(flags: argparse.Namespace) -> None:
    cache_dirs = _paths(flags.seqio_additional_cache_dirs)
    if not cache_dirs and not flags.tfds_data_dir:
        return
    import seqio

    seqio.add_global_cache_dirs(cache_dirs)
    if flags.tfds_data_dir:
        seqio.set_tfds_data_dir_override(flags.tfds_data_dir)


if __name__ == "__main__":
    run()
