"""A process that has paid for the libraries' imports once, and ``python -m MODULE`` in forks of it.

A pipeline of forty stages spends most of its time in starting Python with torch and transformers. The commands of
dvc.yaml stay as they are: a ``python`` that comes first in PATH hands each of them to this process. Nothing of the
project is imported before the fork, so that a stage imports its own files from the folder that it is run in.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

_CLIENT = """#!{python} -IS
import json, os, socket, sys
if sys.argv[1:2] != ["-m"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    job = {{"arguments": sys.argv[2:], "directory": os.getcwd(), "environment": dict(os.environ)}}
    socket.send_fds(server, [b"!"], [0, 1, 2])
    server.sendall(json.dumps(job).encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(16) or 70))
"""


@contextmanager
def started(folder: Path, environment: dict[str, str]) -> Iterator[Path]:
    """Start the process; yields the folder to put in front of PATH.

    Parameters
    ----------
    environment
        That of the commands: libraries read some of it when they are imported.
    """
    address, commands = folder / "socket", folder / "bin"
    commands.mkdir(parents=True)
    client = commands / "python"
    client.write_text(_CLIENT.format(python=sys.executable, address=str(address)))
    client.chmod(0o755)
    # As stages/_app.py says it to libraries when they are imported.
    environment = environment | {"TQDM_DISABLE": "1"}
    command = [sys.executable, str(Path(__file__)), str(address)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield commands
        finally:
            process.kill()


def _run(job: dict[str, Any]) -> NoReturn:
    """What ``python -m MODULE ARGUMENTS`` does."""
    os.chdir(job["directory"])
    os.environ.clear()
    os.environ.update(job["environment"])
    module, *arguments = job["arguments"]
    sys.argv = ["-m", *arguments]
    sys.path.insert(0, job["directory"])
    code = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # All that Python does at its end but to take every library apart, which copies the memory that forks share.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(connection: socket.socket) -> None:
    """In a fork: run what is asked for in another one, which ends as Python does, and say how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as lines:
        job = json.load(lines)
    child = os.fork()
    if child == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        _run(job)
    _, status = os.waitpid(child, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status) & 255).encode())
    os._exit(0)


def main() -> None:
    """Serve until killed."""
    # Python puts this file's folder first; a stage sees its own instead.
    sys.path.pop(0)
    for name in ("torch", "polars", "pyarrow.parquet", "kvpress", "rich.progress", "typer", "pydantic", "ruamel.yaml"):
        importlib.import_module(name)
    # transformers imports nothing before it is asked for a name.
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        getattr(importlib.import_module("transformers"), name)
    assert not {"pipeline", "stages", "studies"} & set(sys.modules)
    gc.freeze()  # keeps forks from touching, and so copying, the memory they share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks are reaped by the system
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[1])
        server.listen()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _serve(connection)
            connection.close()


if __name__ == "__main__":
    main()
