"""What the stage scripts share: Ctrl-C in one line, progress in a pipe, and the next command.

``run_stage(main)`` is all that a script has under its ``__main__`` guard. It loads nothing slow.
"""

import atexit
import contextlib
import logging
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from llama_squad.arguments import (
    AppArguments,
    CreateArguments,
    EvalArguments,
    ModelArguments,
    TrainArguments,
    TrainerArguments,
)
from llama_squad.config import given_config, stage_values

INTERRUPTED = 130
"""Exit status after Ctrl-C, as the shells have it: 128 + SIGINT."""

LINE_INTERVAL_S = 30.0
"""Seconds between two lines about progress where there is no terminal to draw a bar on."""


# Ctrl-C --------------------------------------------------------------------------------------


def run_stage(main: Callable[[], object]) -> None:
    """Run a stage as a program: Ctrl-C ends it with one line and status 130, without a traceback.

    Call it under the ``__main__`` guard only: it takes over the process's SIGINT and progress bars.
    A library may catch the interrupt, or turn it into another error; it counts all the same. The
    process then ends without waiting for its threads, such as those that wait for a server. A
    second Ctrl-C ends it at once. One that comes while the interpreter shuts down changes nothing:
    the work is done, and the status stays 0.
    """
    interrupted = False

    def note(signal_number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            os._exit(INTERRUPTED)
        interrupted = True
        if _loads_torch():  # whose C++ would abort at the exception
            _say_interrupted(KeyboardInterrupt(_kept(_BLOCKS[-1])) if _BLOCKS else None)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    # Python ends by giving SIGINT back to the system, which would kill what is done. First to be
    # registered, so last to run, and threads have been waited for by then.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.unraisablehook = _end_if_interrupted(sys.unraisablehook)
    try:
        _quiet_libraries()
        if not sys.stderr.isatty():
            _lines_for_bars()
        main()
    except BaseException as error:
        if not interrupted:
            raise
        _say_interrupted(error)
    else:
        if interrupted:
            _say_interrupted(None)


def _loads_torch() -> bool:
    """Tell whether torch is being imported, by the mark that Python's import leaves meanwhile."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _end_if_interrupted(otherwise: Callable[[Any], object]) -> Callable[[Any], object]:
    """Return the hook for errors in finalisers: an interrupt there ends the program, too."""

    def hook(fault: Any) -> None:
        if isinstance(fault.exc_value, KeyboardInterrupt):
            _say_interrupted(None)
        otherwise(fault)

    return hook


def _say_interrupted(error: BaseException | None) -> None:
    """Print what is kept and how to go on, and end the process."""
    kept = "nothing was written: the same command starts anew"
    while error is not None:
        if isinstance(error, KeyboardInterrupt) and error.args:
            kept = str(error.args[0])
        error = error.__cause__ or error.__context__
    # torchrun's variable, as torch may not be loaded, and must not be met here, in a handler
    if os.environ.get("RANK", "0") == "0":
        start = "\n" if sys.stderr.isatty() else ""  # the terminal shows ^C, or a bar
        print(f"{start}{Path(sys.argv[0]).name}: interrupted: {kept}.", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def if_interrupted(kept: Callable[[], str] | str) -> Iterator[None]:
    """Give Ctrl-C in this block the line that it ends with; the innermost block's counts.

    Args:
        kept: what is kept, and how to go on; a function is called only then.
    """
    _BLOCKS.append(kept)
    try:
        yield
    except KeyboardInterrupt as error:
        if not error.args:
            error.args = (_kept(kept),)
        raise
    finally:
        _BLOCKS.pop()


_BLOCKS: list[Callable[[], str] | str] = []
"""What the open blocks of ``if_interrupted`` were given, the innermost last."""


def _kept(told: Callable[[], str] | str) -> str:
    return told if isinstance(told, str) else told()


# Progress and warnings -----------------------------------------------------------------------


def _lines_for_bars() -> None:
    """Let every bar, the libraries' too, be a line every so often: stderr is no terminal.

    ``tqdm.auto`` exists to pick the bar that suits the surroundings, a terminal or a notebook, and
    all libraries import it from there. This must come before they do.
    """
    import tqdm
    import tqdm.auto

    base: Any = tqdm.auto.tqdm

    class Lines(base):
        monitor_interval = 0
        disable: bool

        def __init__(self, *args: Any, **options: Any) -> None:
            self._said: float | None = None  # how far the last line said it was
            self._next = time.monotonic() + LINE_INTERVAL_S
            super().__init__(*args, **options)
            self.ncols, self.dynamic_ncols = 0, None

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            if time.monotonic() >= self._next:
                self._next = time.monotonic() + LINE_INTERVAL_S
                self._say()
            return True

        def _say(self) -> None:
            self._said = self.n
            self.fp.write(f"{self}\n")
            self.fp.flush()

        def clear(self, *args: Any, **options: Any) -> None:
            """There is nothing to clear."""

        def close(self) -> None:
            if not self.disable:
                self.disable = True
                self._decr_instances(self)
                if self._said not in (None, self.n):  # a short one says nothing
                    self._say()

    for module in (tqdm, tqdm.auto):
        vars(module)["tqdm"] = Lines


def _quiet_libraries() -> None:
    """Silence, each where it arises, warnings that a user can do nothing about."""
    # TRL and PEFT still use names that transformers 5 renames
    warnings.filterwarnings("ignore", message=".*will be removed in v6.*", category=FutureWarning)
    # TRL warns of what label smoothing costs in its own loss, which is not ours
    warnings.filterwarnings("ignore", message=".*label_smoothing_factor.*", category=FutureWarning)
    # bitsandbytes 0.50 looks for an optional kernel that this project makes no use of, since it has
    # no gradient (``llama_squad.modeling``)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "gemm_4bit_forward" not in record.getMessage()
    )
    # the trainer aligns a model with its tokenizer, as it should
    logging.getLogger("transformers.trainer_utils").addFilter(
        lambda record: "new PAD/BOS/EOS tokens" not in record.getMessage()
    )


# The next command ----------------------------------------------------------------------------

_STAGES: dict[str, tuple[str, tuple[type, ...]]] = {
    "create": ("create_squad_dataset.py", (CreateArguments,)),
    "train": ("train_llama_squad.py", (TrainArguments, ModelArguments, TrainerArguments)),
    "test": ("test_llama_squad.py", (EvalArguments, ModelArguments)),
    "summarize": ("summarize_results.py", ()),
    "app": ("app.py", (AppArguments, ModelArguments)),
}


def next_command(stage: str, argv: Sequence[str] | None, *words: str, **flags: str | None) -> str:
    """Return a command that runs a stage after this one, to be copied as it is.

    Args:
        stage: which, one of ``llama_squad.config.STAGES``.
        argv: this stage's command line: its ``--config`` is repeated.
        words: arguments without a flag.
        flags: what the stage must take from this one. One that it would take anyway, as its file
            or default says so, is left out; so is None.
    """
    script, types = _STAGES[stage]
    config = given_config(sys.argv[1:] if argv is None else argv)
    try:
        known = stage_values(stage, types, config)
    except ValueError:  # that stage will say so
        known = {}
    line = ["python", script, *words, *(["--config", config] if config else [])]
    line += [
        f"--{name}={value}"
        for name, value in flags.items()
        if value is not None and known.get(name) != value
    ]
    return shlex.join(line)
