"""What one report is about: the sections of params.yaml that it shows, handed in. It reads nothing."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.matrix import MatrixParams
from pipeline.reporting.params import ReportParams
from pipeline.reporting.styles import Styles

if TYPE_CHECKING:
    from pipeline.benchmarks.base import Benchmark
    from pipeline.models.params import ModelParams


@dataclass(frozen=True)
class Run:
    """What was run, and how it is shown.

    Attributes
    ----------
    models, benchmarks
        Those of the matrix, by name.
    budgets
        Tokens kept per head, ascending.
    protected
        How many of the first and of the last tokens are always kept.
    steps, learning_rate
        Of each training.
    """

    matrix: MatrixParams
    report: ReportParams
    styles: Styles
    models: "Mapping[str, ModelParams]"
    benchmarks: "Mapping[str, Benchmark]"
    budgets: tuple[int, ...]
    protected: tuple[int, int]
    steps: int
    learning_rate: float

    @property
    def middle_budget(self) -> int:
        """The budget that sentences and coloured texts are about."""
        return self.budgets[len(self.budgets) // 2]

    def in_order(self, benchmark: str, tasks: Collection[str]) -> list[str]:
        """Tasks in the benchmark's own order; those that it does not name by their names behind them."""
        named = self.benchmarks[benchmark].tasks_of
        return sorted(tasks, key=lambda task: (named.index(task) if task in named else len(named), task))
