"""A command line as its user meets it, in a process of its own or in this one.

A process of its own spends seconds on imports. In this one the same file is run as the main program, down to its exit:
what is left out is what only a process has, such as signals, its environment, and which modules come with ``--help``.
The lock on a stage's work is given back when a process ends, so here it stays.
"""

import contextlib
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(REPOSITORY),
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def in_a_process(
    directory: Path, module: str, *arguments: str, python: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """``python -m module arguments`` in a directory."""
    return subprocess.run(
        [sys.executable, *python, "-m", module, *arguments],
        cwd=directory,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def in_this_process(directory: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same without a process: what it prints and its exit code; an exception that no one caught comes out."""
    path = REPOSITORY.joinpath(*module.split("."))
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        _as_a_new_process(),
        contextlib.chdir(directory),
        patch.object(sys, "argv", [module, *arguments]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as end,
    ):
        runpy.run_path(str(file), run_name="__main__")
    assert isinstance(end.value.code, int)
    return subprocess.CompletedProcess([module, *arguments], end.value.code, stdout.getvalue(), stderr.getvalue())


@contextlib.contextmanager
def _as_a_new_process() -> Iterator[None]:
    """Nothing logs elsewhere, and whatever a command sets for its process is put back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    libraries = {name: logger.level for name, logger in root.manager.loggerDict.items() if hasattr(logger, "level")}
    interrupt, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    root.handlers[:] = []
    try:
        with patch.dict(os.environ, ENVIRONMENT):
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for name, before in libraries.items():
            logging.getLogger(name).setLevel(before)
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = hook
