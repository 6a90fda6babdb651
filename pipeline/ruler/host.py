"""Runs NVIDIA's scripts in forks of one process that has paid for their imports once.

A program, not a module: ``python ruler_host.py`` reads the path of a job file per line of stdin, forks,
and does in the fork what ``python script arguments`` would. It leaves the fork's process group in
``job.pid`` and its exit status in ``job.status``. It imports nothing of this project.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

# The line of niah.py that makes the list; a script without it runs as it is.
_PAIRS = 'words = [f"{adj}-{noun}" for adj in adjs for noun in nouns]\nwords = sorted(list(set(words)))'


def _preload() -> None:
    # Importing transformers takes longer than most tasks. Nothing is computed here: a fork of a process
    # with running threads could hang.
    for name in ("nltk.tokenize", "scipy.special", "wonderwords"):
        importlib.import_module(name)
    # transformers imports nothing before it is asked for a name.
    importlib.import_module("transformers").__getattr__("AutoTokenizer")


def _pairs() -> list[str]:
    """The six million adjective-noun pairs that the needle script picks its keys from, in its order."""
    read = importlib.import_module("wonderwords.random_word")._get_words_from_text_file
    nouns = read("nounlist.txt")
    return sorted({f"{adjective}-{noun}" for adjective in read("adjectivelist.txt") for noun in nouns})


def _share_pairs(pairs: list[str]) -> dict[str, Any]:
    # The script would make the same list anew each time, which takes it far longer than its samples. It
    # is given no words to combine, and its sorted([]) gives the list that this process has made.
    importlib.import_module("wonderwords.random_word").__dict__["_get_words_from_text_file"] = lambda name: []
    return {"sorted": lambda items, **options: sorted(items, **options) or pairs}


def _run(job: dict[str, Any], pairs: list[str]) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job["directory"])
    # Whoever started this may be gone: a script that loops forever ends here at the latest.
    signal.alarm(int(job["time_limit"]))
    if job["fresh"] and not _needs_pairs(job):
        # The scripts seed before they import transformers, which imports rich if it is there, which draws
        # a number: what they make depends on what this process has already imported. niah.py is exempt,
        # it imports all that before it seeds.
        os.environ["PYTHONPATH"] = job["package"]
        os.execv(sys.executable, [sys.executable, job["script"], *job["arguments"]])
    sys.argv = [job["script"], *job["arguments"]]
    sys.path[0:0] = [str(Path(job["script"]).parent), job["package"]]
    runpy.run_path(job["script"], _share_pairs(pairs) if _needs_pairs(job) else None, run_name="__main__")


def _needs_pairs(job: dict[str, Any]) -> bool:
    return _PAIRS in Path(job["script"]).read_text()


def _supervise(path: Path, job: dict[str, Any], pairs: list[str]) -> None:
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
    _, encoded = os.waitpid(child, 0)
    _write(path.with_suffix(".status"), str(os.waitstatus_to_exitcode(encoded)))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def main() -> None:
    """Serve jobs until stdin closes."""
    # Python puts this file's folder first; a module of it must not stand in for a library of the same name.
    sys.path.pop(0)
    _preload()
    # Supervisors are reaped by the system.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    pairs: list[str] = []
    while line := sys.stdin.readline():
        path = Path(line.strip())
        job = json.loads(path.read_text())
        if not pairs and _needs_pairs(job):
            pairs = _pairs()
            # Keeps the forks from touching, and so copying, the memory they share.
            gc.freeze()
        if os.fork() == 0:
            try:
                _supervise(path, job, pairs)
            finally:
                os._exit(0)


if __name__ == "__main__":
    main()
