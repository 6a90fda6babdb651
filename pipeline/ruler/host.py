"""Runs NVIDIA's scripts in forks of one process that has paid for their imports once.

A program, not a module: ``python host.py`` reads the path of a job file per line of stdin, forks,
and does in the fork what ``python script arguments`` would. It leaves the fork's process group in
``job.pid`` and its exit status in ``job.status``. When stdin closes it ends, and however it ends, so do the
scripts. It imports nothing of this project.
"""

import functools
import gc
import itertools
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

# The line of niah.py that makes the list; a script without it runs as it is.
_PAIRS = 'words = [f"{adj}-{noun}" for adj in adjs for noun in nouns]\nwords = sorted(list(set(words)))'


@functools.cache
def _preload() -> None:
    # Importing transformers takes longer than most tasks. Nothing is computed here: a fork of a process
    # with running threads could hang.
    import nltk.tokenize  # noqa: F401
    import scipy.special  # noqa: F401
    import wonderwords  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401


@functools.cache
def _pairs() -> list[str]:
    """The six million adjective-noun pairs that the needle script picks its keys from, in its order."""
    from wonderwords.random_word import _get_words_from_text_file as read

    adjectives, nouns = (sorted(set(read(f"{kind}list.txt"))) for kind in ("adjective", "noun"))
    # In a seventh of the script's time, which sorts a set: this is nearly in order before, and a pair that comes twice
    # ("a-b" with "c", "a" with "b-c") does so side by side after.
    pairs = [f"{adjective}-{noun}" for adjective in adjectives for noun in nouns]
    pairs.sort()
    pairs = [pair for pair, _ in itertools.groupby(pairs)]
    # Keeps the forks from touching, and so copying, the memory they share.
    gc.freeze()
    return pairs


def _share_pairs(pairs: list[str]) -> dict[str, Any]:
    # The script would make the same list anew each time, which takes it far longer than its samples. It
    # is given no words to combine, and its sorted([]) gives the list that this process has made.
    from wonderwords import random_word

    random_word.__dict__["_get_words_from_text_file"] = lambda name: []
    return {"sorted": lambda items, **options: sorted(items, **options) or pairs}


def _run(job: dict[str, Any], pairs: list[str]) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job["directory"])
    # A script that loops forever ends here.
    signal.alarm(int(job["time_limit"]))
    if _is_alone(job):
        os.environ["PYTHONPATH"] = job["package"]
        os.execv(sys.executable, [sys.executable, job["script"], *job["arguments"]])
    sys.argv = [job["script"], *job["arguments"]]
    sys.path[0:0] = [str(Path(job["script"]).parent), job["package"]]
    runpy.run_path(job["script"], _share_pairs(pairs) if _needs_pairs(job) else None, run_name="__main__")


def _is_alone(job: dict[str, Any]) -> bool:
    # The scripts seed before they import transformers, which imports rich if it is there, which draws
    # a number: what they make depends on what this process has already imported. niah.py is exempt,
    # it imports all that before it seeds.
    return bool(job["fresh"]) and not _needs_pairs(job)


def _needs_pairs(job: dict[str, Any]) -> bool:
    return _PAIRS in Path(job["script"]).read_text()


def _supervise(path: Path, job: dict[str, Any], pairs: list[str], host: int) -> None:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _write(path.with_suffix(".pid"), str(os.getpid()))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _run(job, pairs)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if os.getppid() != host:
            os.killpg(0, signal.SIGKILL)
        time.sleep(0.02)
    _write(path.with_suffix(".status"), str(os.waitstatus_to_exitcode(ended[1])))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def main() -> None:
    """Serve jobs until stdin closes."""
    # Python puts this file's folder first; a module of it must not stand in for a library of the same name.
    sys.path.pop(0)
    host = os.getpid()
    # Supervisors are reaped by the system.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while line := sys.stdin.readline():
        path = Path(line.strip())
        job = json.loads(path.read_text())
        if not _is_alone(job):
            _preload()
        pairs = _pairs() if _needs_pairs(job) else []
        if os.fork() == 0:
            try:
                _supervise(path, job, pairs, host)
            finally:
                os._exit(0)


if __name__ == "__main__":
    main()
