"""The command line: `python -m glimmer_jax.main --run_mode=MODE --gin_file=… --gin.X=…`.

Flags are T5X's. One job is set by flags instead of gin, since it takes two files and nothing else:
KILT's official scores, `--run_mode=score --gold=FILE --guess=FILE [--ks=1,5,10,20]`. Exit codes:
0 done; 42 preempted, safe to retry; 2 invalid input, do not retry; 1 a bug; 130 Ctrl-C.
"""

import argparse
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glimmer_jax.runtime import exit_codes
from glimmer_jax.runtime.preemption import STOP, StopRequested

# Mode -> function, imported when the mode is run.
MODES = {
    "passages": "glimmer_jax.modes.passages:passages",
    "retrieve": "glimmer_jax.modes.retrieve:retrieve",
    "train": "glimmer_jax.modes.train:train",
    "codebooks": "glimmer_jax.modes.codebooks:learn_codebooks",
    "build_memory": "glimmer_jax.modes.build_memory:build_memory",
    "memory": "glimmer_jax.modes.memory:memory",
    "eval": "glimmer_jax.modes.evaluate:evaluate",
    "infer": "glimmer_jax.modes.infer:infer",
    "score": "glimmer_jax.modes.score:score",
    "export": "glimmer_jax.modes.export:export",
}
# What all processes of a job do together; the other modes are the work of one.
JOBS = ("retrieve", "train", "codebooks", "build_memory", "eval", "infer")
# Not configured itself: it asks about one of these, whichever the gin files configure.
PREFLIGHT = "preflight"


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """Flags; every `--gin.NAME=VALUE` becomes the binding `NAME = VALUE`."""
    parser = argparse.ArgumentParser(
        prog="glimmer", description="FiD, LUMEN and GLIMMER.", allow_abbrev=False
    )
    parser.add_argument("--run_mode", choices=sorted([*MODES, PREFLIGHT]), default="train")
    parser.add_argument("--action", help="of --run_mode=memory; short for --gin.ACTION")
    parser.add_argument("--gin_file", action="append", default=[], metavar="PATH")
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
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of many processes, as TPU pods and Slurm tell",
    )
    parser.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--num_processes", type=int, metavar="N")
    parser.add_argument("--process_id", type=int, metavar="I", help="from 0 to N - 1")
    parser.add_argument("--debug", action="store_true", help="tracebacks of bad input")
    flags, others = parser.parse_known_args(argv)
    for other in others:
        name, equals, value = other.removeprefix("--gin.").partition("=")
        if not other.startswith("--gin.") or not equals:
            parser.error(f"unknown argument {other!r}; bindings are written --gin.NAME=VALUE")
        flags.gin_bindings.append(f"{name} = {value}")
    if (flags.topology or flags.json) and flags.run_mode != PREFLIGHT:
        parser.error("--topology and --json want --run_mode=preflight")
    if official_arguments(flags):
        if flags.run_mode != "score" or not flags.gold or not flags.guess:
            parser.error("--gold, --guess and --ks want --run_mode=score and both files")
        if flags.gin_file or flags.gin_bindings:
            parser.error("--gold and --guess take no gin; without them gin/runs/score.gin scores")
    if flags.action is not None:
        flags.gin_bindings.append(f"ACTION = {flags.action!r}")
    return flags


def official_arguments(flags: argparse.Namespace) -> dict[str, Any]:
    """The given ones of the flags of KILT's official scores."""
    given = {name: getattr(flags, name) for name in ("gold", "guess", "ks")}
    return {name: value for name, value in given.items() if value is not None}


def run_mode(flags: argparse.Namespace) -> Any:
    """Configures the mode's function, with gin or with the flags of its own, and calls it."""
    if arguments := official_arguments(flags):
        return _find("glimmer_jax.modes.score:official")(**arguments)
    if flags.run_mode == PREFLIGHT:
        return _preflight(flags)
    from glimmer_jax import configuration

    function = _find(MODES[flags.run_mode])
    search_paths = [path for path in flags.gin_search_paths.split(",") if path]
    configuration.parse(flags.gin_file, flags.gin_bindings, search_paths)
    configured = configuration.configured(function)
    _set_seqio_dirs(flags)
    kwargs = {}
    if "operative_config" in function.__code__.co_varnames[: function.__code__.co_argcount]:
        kwargs["operative_config"] = configuration.operative_config
    return configured(**kwargs)


def _preflight(flags: argparse.Namespace) -> Any:
    import jax

    # The compiler for the slice runs on this machine's CPU; its own accelerators are not looked at.
    jax.config.update("jax_platforms", "cpu")
    # A program for a slice that is not there can be kept between runs, and cannot be read again.
    jax.config.update("jax_enable_compilation_cache", False)
    from glimmer_jax import configuration
    from glimmer_jax.modes import preflight

    search_paths = [path for path in flags.gin_search_paths.split(",") if path]
    configuration.parse(flags.gin_file, flags.gin_bindings, search_paths, preflight.UNBOUND)
    for job in preflight.JOBS:
        try:
            settings = configuration.settings(_find(MODES[job]))
        except configuration.ConfigError:
            continue
        return preflight.preflight(job, settings, flags.topology, flags.json)
    raise ValueError(
        f"The gin files configure none of {', '.join(preflight.JOBS)}. Add the --gin_file of "
        "gin/runs that the job itself has."
    )


def _check_alone(mode: str) -> None:
    """Raises ValueError where a job of many processes would do the same work many times."""
    import jax

    if mode not in JOBS and jax.process_count() > 1:
        raise ValueError(
            f"--run_mode={mode} is the work of one process, and this job has {jax.process_count()}. "
            "Run it on one machine, without --distributed."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a mode; returns the exit code. Raises errors that nobody foresaw."""
    flags = parse_flags(sys.argv[1:] if argv is None else argv)
    message: object
    with STOP.installed():
        try:
            from glimmer_jax.runtime.distributed import join

            join(
                flags.distributed, flags.coordinator_address, flags.num_processes, flags.process_id
            )
            _check_alone(flags.run_mode)
            run_mode(flags)
        except StopRequested as stop:
            message, code = stop, STOP.exit_code
        except Exception as error:
            if (outcome := _classify(error)) is None:
                raise
            if flags.debug:
                traceback.print_exc()
            message, code = outcome
        else:
            return exit_codes.DONE
        from glimmer_jax.configuration import first_line

        print(f"glimmer: {first_line(message)}", file=sys.stderr)
        return code


def _classify(error: Exception) -> tuple[object, int] | None:
    """The message for an error and the exit code; None for a bug."""
    from glimmer_jax.storage import errors
    from glimmer_jax.training.log import NonFiniteError

    if (kind := errors.classify_error(error)) is not None:
        retry = kind == "temporary"
        code = exit_codes.RETRY if retry else exit_codes.INVALID_INPUT
        return errors.describe_error(error), code
    if isinstance(error, (ValueError, FileNotFoundError, NonFiniteError)) and _is_ours(error):
        return error, exit_codes.INVALID_INPUT
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
    signals = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    flags = parse_flags(sys.argv[1:])
    if flags.distributed or flags.coordinator_address is not None:
        from glimmer_jax.runtime.supervisor import work_in_child

        work_in_child(exit_codes.RETRY)
    STOP.install()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Compiled programs are kept between runs; set the variable to "" to keep none.
    cache = Path.home() / ".cache" / "glimmer_jax" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("glimmer_jax").setLevel(logging.INFO)
    # seqio's advice about lengths and caches; what is wrong comes as an error.
    logging.getLogger("absl").setLevel(logging.ERROR)
    if not flags.debug:
        from glimmer_jax.runtime.filter_stderr import filter_stderr

        filter_stderr()
    try:
        code = main()
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        print(
            "glimmer: This is a bug. Please report it with the lines above and the command.",
            file=sys.stderr,
        )
        code = exit_codes.BUG
    STOP.finish(code)
    if code:
        from glimmer_jax.runtime.distributed import exit_after

        exit_after(code)
    sys.exit(code)


def _integers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"wants numbers like 1,5,10, got {text!r}") from None


def _find(place: str) -> Callable[..., Any]:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def _set_seqio_dirs(flags: argparse.Namespace) -> None:
    cache_dirs = [path for path in flags.seqio_additional_cache_dirs.split(",") if path]
    if not cache_dirs and not flags.tfds_data_dir:
        return
    import seqio

    seqio.add_global_cache_dirs(cache_dirs)
    if flags.tfds_data_dir:
        seqio.set_tfds_data_dir_override(flags.tfds_data_dir)


if __name__ == "__main__":
    run()
