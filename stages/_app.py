"""What every stage shares: the error boundary, logging, progress bars, run-time options."""

import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.errors import PipelineError
from pipeline.executor.place import check_device as check_device
from pipeline.executor.place import limit_threads as limit_threads
from pipeline.files import is_disk_full

if TYPE_CHECKING:
    from pipeline.executor.units import Advance, Executor, Job

ModelOption = Annotated[str, typer.Option(help="Name of a model in params.yaml.")]
BenchmarkOption = Annotated[str, typer.Option(help="Name of a benchmark in params.yaml.")]
TrainedOnOption = Annotated[str, typer.Option(help="Name of the benchmark in params.yaml that is learned from.")]
DeviceOption = Annotated[str, typer.Option(envvar="KVP_DEVICE", help="Where to compute: cpu, cuda, cuda:1, ...")]
ExecutorOption = Annotated[
    Literal["local", "ray"], typer.Option(envvar="KVP_EXECUTOR", help="Who computes: this process, or Ray's workers.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option(envvar="KVP_WORKERS", min=1, help="Ray's workers; by default as many as there is room for."),
]


def run(*commands: Callable[..., None], checked: bool = True) -> None:
    """Run a command line, several ``commands`` by their names; a PipelineError becomes one sentence and exit code 1.

    ``checked``: the whole of params.yaml is read before it starts, so that a typo anywhere stops the first stage.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    # Warnings of libraries about their own internals are not this user's business; errors still show.
    for library in ("transformers", "httpx", "huggingface_hub", "alembic", "kvpress", "matplotlib"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        # Bars of libraries would fill a log file with carriage returns. Read when tqdm is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    for command in commands:
        app.command()(_with_checked_params(command) if checked else command)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the shell ignores it
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _report_unraisable
    said = ""
    try:
        # Typer hands back the code of an early end; for Ctrl-C that is 130, or an exception in other versions.
        code = app(standalone_mode=False) or 0
    except PipelineError as error:
        code, said = 1, f"error: {error}"
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:
        if error.__class__.__module__.startswith(("click", "typer")) and hasattr(error, "show"):
            error.show()
            code = getattr(error, "exit_code", 2)
        elif is_disk_full(error):
            # Wherever it came from: every library has an exception of its own for it.
            reason = " ".join(str(error).split())[:200]
            said = f"error: No space is left on the disk ({reason}); free some and run again, finished pieces are kept."
            code = 1
        else:
            raise
    if code == 130:
        said = "interrupted; run again to continue where it stopped."
    if said:
        print(said, file=sys.stderr)  # noqa: T201 - the one place that speaks to the user
    sys.exit(code)


def _with_checked_params(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def with_checked_params(**options: object) -> None:
        from pipeline.params import load_params

        load_params()
        command(**options)

    return with_checked_params


_interrupted = threading.Event()


def _interrupt(_signal: int, _frame: object) -> None:
    """Ctrl-C. Python drops what is raised inside a ``__del__``; the next step of the progress then raises it again."""
    _interrupted.set()
    raise KeyboardInterrupt


def _report_unraisable(dropped: "sys.UnraisableHookArgs") -> None:
    if not issubclass(dropped.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(dropped)


@contextmanager
def progress(description: str, total: int) -> Iterator["Advance"]:
    """Show progress with ETA on stderr: a bar on a terminal, a line per tenth elsewhere.

    Each step raises KeyboardInterrupt if Ctrl-C was pressed and got lost.
    """
    if sys.stderr.isatty():
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        text, status_text = TextColumn("{task.description}"), TextColumn("{task.fields[status]}")
        with Progress(text, *columns, status_text, console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=total, status="")

            def advance(count: int = 1, status: str = "") -> None:
                if _interrupted.is_set():
                    raise KeyboardInterrupt
                bar.advance(task, count)
                if status:
                    bar.update(task, status=status)

            yield advance
        return
    started, done, shown = time.monotonic(), 0, 0

    def log(count: int = 1, status: str = "") -> None:
        nonlocal done, shown
        if _interrupted.is_set():
            raise KeyboardInterrupt
        done += count
        if done * 10 // total > shown:
            shown = done * 10 // total
            elapsed = time.monotonic() - started
            remaining = elapsed * (total - done) / done
            logging.getLogger(__name__).info(
                "%s: %d of %d, %.0f s elapsed, %.0f s to go %s", description, done, total, elapsed, remaining, status
            )

    yield log


def run_job(job: "Job[Any]", executor: "Executor") -> None:
    """Do all units of a job, with their progress."""
    from pipeline.executor.units import run_units

    units = job.units()
    with progress(job.name, sum(units.values())) as advance:
        run_units(job, units, executor, advance)
