"""A program that does a pickled job as a stage would: ``python -m tests.executor.drive FILE``."""

import pickle
from pathlib import Path

from pipeline.executor.units import Executor
from stages._app import ExecutorOption, WorkersOption, run, run_job


def main(file: Path, executor: ExecutorOption = "local", workers: WorkersOption = None) -> None:
    """Do the job in FILE."""
    who = Executor(executor, workers)
    job = pickle.loads(file.read_bytes())
    who.check(job.device)
    run_job(job, who)


if __name__ == "__main__":
    run(main, checked=False)
