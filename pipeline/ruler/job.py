"""The rows of one split as units of work: a unit is a task. It knows no stage."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.closure import Code
from pipeline.errors import PipelineError
from pipeline.executor.place import threads
from pipeline.executor.units import Advance
from pipeline.files import write_text
from pipeline.ruler.generator import Host, checked_rows, host
from pipeline.ruler.splits import Plan, fresh_rows
from pipeline.ruler.wheel import Task, read_tasks
from pipeline.samples.rows import Row


@dataclass(frozen=True)
class RulerJob:
    """See :class:`pipeline.executor.units.Job`; a unit leaves the rows of its task.

    Attributes
    ----------
    nltk_data
        Where :func:`pipeline.ruler.wheel.install_punkt` has put its tables.
    jobs
        A host that jobs of this process share, as it takes long to get ready; a job that fails ends it. Without it, as
        on its way to workers, the job starts its own.
    """

    # A unit waits for a script, which computes on one CPU.
    device: ClassVar[str] = "cpu"
    code: ClassVar[Code] = Code(__file__)

    name: str
    directory: Path
    nltk_data: Path
    plan: Plan
    jobs: Host | None = None

    @property
    def together(self) -> int:
        """As many as there are threads, and two where there is one: a script waits for its disk at times."""
        return max(2, threads())

    @property
    def memory(self) -> int:
        """The host with its pairs of words, a script and the questions: 2.3 GiB with this process, and some more."""
        return 3 * 2**30

    def units(self) -> Mapping[str, int]:
        """A task each, last those of needles: in the test split the others do not wait for the host to get ready."""
        tasks = read_tasks(self.plan.wheel)
        return dict.fromkeys(sorted(self.plan.wanted.tasks, key=lambda task: tasks[task].script == "niah"), 1)

    def is_done(self, unit: str) -> bool:
        """Whether the task's rows are there."""
        return self._rows(unit).is_file()

    @contextmanager
    def open(self) -> Iterator[tuple[Host, Any, dict[str, Task]]]:
        """The process that runs the scripts, the model's tokenizer, and the tasks."""
        from pipeline.models.tokenizer import load_tokenizer

        own = host(self.nltk_data, self.directory / "host.log") if self.jobs is None else nullcontext(self.jobs)
        with own as jobs:
            try:
                yield jobs, load_tokenizer(self.plan.model), read_tasks(self.plan.wheel)
            except BaseException:
                jobs.kill()
                raise

    def run(self, state: tuple[Host, Any, dict[str, Task]], unit: str, advance: Advance) -> None:
        """Make the rows of one task."""
        jobs, tokenizer, tasks = state
        rows = fresh_rows(self.plan, tasks[unit], tokenizer, jobs, self.directory / "scratch")
        write_text(self._rows(unit), json.dumps(rows))
        advance(1, f"{self.plan.split} {unit}")

    def gather(self) -> dict[str, list[Row]]:
        """The rows of every task.

        Raises
        ------
        PipelineError
            A file is damaged.
        """
        return {task: self._read(self._rows(task)) for task in self.plan.wanted.tasks}

    def _read(self, file: Path) -> list[Row]:
        try:
            return checked_rows(file, json.loads(file.read_bytes()))
        except (OSError, ValueError) as error:
            raise PipelineError(f"{file} cannot be read ({error}); delete it and run again.") from None

    def _rows(self, task: str) -> Path:
        return self.directory / "rows" / self.plan.split / f"{task}.json"
