"""The sweep of a benchmark's test samples as units of work: a unit is one sample. It knows no stage."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.closure import Code
from pipeline.evaluation.answers import answer_table, cost_table
from pipeline.evaluation.parts import merge_parts, write_part
from pipeline.evaluation.sweep import Sweep
from pipeline.evaluation.verdict import read_verdict, require_readable
from pipeline.eviction.baselines.base import Baseline
from pipeline.eviction.budget import AtBenchmark, EvaluationParams
from pipeline.eviction.rankers import make_rankers
from pipeline.executor.place import model_memory
from pipeline.executor.units import Advance
from pipeline.models.load import load_model
from pipeline.models.tokenizer import load_tokenizer
from pipeline.policy.agents import load_policy
from pipeline.samples.sample import Sample, read_samples
from pipeline.tables import PolicyKey


@dataclass(frozen=True)
class SweepJob:
    """See :class:`pipeline.executor.units.Job`; a unit leaves its rows of both tables, the answers last.

    Attributes
    ----------
    model
        Its name; ``weights`` and ``verdict`` are where it lies and what was found of it.
    test
        The samples; a sample's seed is its place among them.
    policies
        Where each lies.
    """

    together: ClassVar[int] = 1

    name: str
    directory: Path
    code: Code
    device: str
    model: str
    dtype: str
    weights: Path
    verdict: Path
    test: Path
    policies: Mapping[PolicyKey, Path]
    baselines: Mapping[str, Baseline]
    evaluation: EvaluationParams
    here: AtBenchmark

    @property
    def memory(self) -> int:
        """As much as its model takes."""
        return model_memory(self.weights)

    def units(self) -> Mapping[str, int]:
        """A sample each."""
        return {f"{index:05d}": 1 for index in range(len(read_samples(self.test)))}

    def is_done(self, unit: str) -> bool:
        """Whether the sample's answers are there."""
        return self._part("answers", unit).exists()

    @contextmanager
    def open(self) -> Iterator[tuple[Sweep, Sequence[Sample]]]:
        """The sweep with model and policies, and the samples, none of which it will refuse."""
        rankers = make_rankers(self.baselines)
        policies = {key: load_policy(path, self.model)[0].to(self.device) for key, path in self.policies.items()}
        samples = read_samples(self.test)
        require_readable(read_verdict(self.verdict, self.model, self.dtype), samples)
        model, tokenizer = load_model(self.weights, self.dtype, self.device), load_tokenizer(self.weights)
        budgets, whole = self.here.budgets or self.evaluation.budgets, self.here.shorter == "whole"
        sweep = Sweep(model, tokenizer, policies, rankers, self.evaluation, budgets, whole)
        sweep.check(samples)
        yield sweep, samples

    def run(self, state: tuple[Sweep, Sequence[Sample]], unit: str, advance: Advance) -> None:
        """Ask every policy at every budget what one sample asks."""
        sweep, samples = state
        sample = samples[int(unit)]
        said, costs = sweep.run(sample, self.evaluation.seed + int(unit))
        write_part(self._part("cost", unit), cost_table(self.model, sample, costs, sweep.layout.ranked))
        write_part(self._part("answers", unit), answer_table(self.model, sample, said))
        advance()

    def gather(self) -> Path:
        """One table of each kind, from all units; returns the directory that holds them."""
        merged = self.directory / "merged"
        for table in ("cost", "answers"):
            merge_parts([self._part(table, unit) for unit in self.units()], merged / f"{table}.parquet")
        return merged

    def _part(self, table: str, unit: str) -> Path:
        return self.directory / table / f"{unit}.parquet"
