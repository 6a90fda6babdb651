"""The roof over all sections of params.yaml: the whole file, and what only the whole file can say.

Stages read the sections that they need; this is what their command line checks before they start, so that a typo
anywhere stops the first stage and not the last.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.benchmarks.base import Benchmark, read_benchmark
from pipeline.errors import PipelineError
from pipeline.evaluation.texts import TextsParams
from pipeline.eviction.baselines.base import OWN, Baseline
from pipeline.eviction.budget import AtBenchmark, EvaluationParams
from pipeline.matrix import MatrixParams
from pipeline.models.params import ModelParams
from pipeline.policy.estimators.base import ESTIMATORS, Estimator
from pipeline.policy.inputs.base import INPUTS
from pipeline.policy.train import TrainParams
from pipeline.reporting.params import ReportParams, ShownAs
from pipeline.section import PARAMS, FileStem, Name, entry, find, missing, parse, validate
from pipeline.sources.pins import SourceParams
from pipeline.traces.params import TracesParams

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class BenchmarkEntry:
    """``benchmarks.<name>``: how its samples are made, how it is evaluated, and what a reader is told of it."""

    samples: Benchmark
    evaluate: AtBenchmark
    shown: ShownAs


@dataclass(frozen=True, kw_only=True)
class Params:
    """The whole of params.yaml. ``profile`` names the file under profiles/ that it was made from."""

    profile: str
    matrix: MatrixParams
    sources: dict[str, SourceParams]
    models: dict[str, ModelParams]
    benchmarks: dict[str, BenchmarkEntry]
    traces: TracesParams
    train: TrainParams
    estimators: dict[str, Estimator]
    evaluation: EvaluationParams
    baselines: dict[str, Baseline]
    texts: TextsParams
    report: ReportParams

    def budgets(self, benchmark: str) -> tuple[int, ...]:
        """The budgets that a benchmark is evaluated at, in tokens."""
        return self.benchmarks[benchmark].evaluate.budgets or self.evaluation.budgets

    def model_sources(self, name: str) -> dict[str, SourceParams]:
        """What a model is made from, by its role."""
        return {"source": entry(self.sources, self.models[name].source, "sources")}

    def benchmark_sources(self, name: str) -> dict[str, SourceParams]:
        """What a benchmark's samples are made from, by their role."""
        named = self.benchmarks[name].samples.sources
        return {role: entry(self.sources, source, "sources") for role, source in named.items()}


_SECTIONS = tuple(Params.__dataclass_fields__)
_ENTRY = ("samples", "evaluate", "shown")


def load_params(path: Path = PARAMS) -> Params:
    """Read and validate a whole params file.

    Raises
    ------
    PipelineError
        The file is missing, is not YAML, or has an unknown, mistyped or out-of-range key. Names the file and the
        first key at fault.
    """
    return check_params(parse(path), path)


def check_params(tree: dict[str, Any], path: Path = PARAMS) -> Params:
    """A parsed params file as what it says; ``path`` is for the error, see :func:`load_params`."""
    _known_keys(tree, _SECTIONS, "", path)

    def section(key: str, kind: type[Value]) -> Value:
        return validate(find(tree, key, path), kind, key, path)

    def entries(key: str, read: Callable[[str], Value]) -> dict[str, Value]:
        names = section(key, dict[Name, Any])
        return {name: read(name) for name in names}

    def benchmark(name: str) -> BenchmarkEntry:
        key = f"benchmarks.{name}"
        _known_keys(find(tree, key, path), _ENTRY, f"{key}.", path)
        return BenchmarkEntry(
            samples=read_benchmark(name, path, tree),
            evaluate=section(f"{key}.evaluate", AtBenchmark),
            shown=section(f"{key}.shown", ShownAs),
        )

    def estimator(name: str) -> Estimator:
        if name not in ESTIMATORS.names():
            raise PipelineError(
                f"{path}: estimators: '{name}' is no estimator; known: {', '.join(ESTIMATORS.names())}."
            )
        return section(f"estimators.{name}", ESTIMATORS.load(name))

    params = Params(
        profile=section("profile", FileStem),
        matrix=section("matrix", MatrixParams),
        sources=section("sources", dict[Name, SourceParams]),
        models=section("models", dict[Name, ModelParams]),
        benchmarks=entries("benchmarks", benchmark),
        traces=section("traces", TracesParams),
        train=section("train", TrainParams),
        estimators=entries("estimators", estimator),
        evaluation=section("evaluation", EvaluationParams),
        baselines=section("baselines", dict[Name, Baseline]),
        texts=section("texts", TextsParams),
        report=section("report", ReportParams),
    )
    for name, baseline in params.baselines.items():
        if baseline.own is not None:
            validate(baseline.options, OWN.load(baseline.own), f"baselines.{name}.options", path)
    for problem in (
        _names_that_do_not_exist,
        _seen_but_not_cached,
        _trained_on_what_is_only_evaluated,
        _budgets_out_of_range,
    ):
        if found := problem(params):
            raise PipelineError(f"{path}: {found}.")
    return params


def _known_keys(node: Any, known: tuple[str, ...], prefix: str, path: Path) -> None:
    if not isinstance(node, dict):
        raise PipelineError(f"{path}: {prefix.rstrip('.') or 'the file'}: it should be a mapping (got {node!r}).")
    for key in node:
        if key not in known:
            raise PipelineError(f"{path}: unknown key {prefix}{key}; remove it or correct its spelling.")
    for key in known:
        if key not in node:
            raise PipelineError(f"{path}: {missing(f'{prefix}{key}')}")


def _names_that_do_not_exist(params: Params) -> str | None:
    named: dict[str, tuple[tuple[str, ...], str, Collection[str]]] = {
        "matrix.model": (params.matrix.model, "models", params.models),
        "matrix.trained_on": (params.matrix.trained_on, "benchmarks", params.benchmarks),
        "matrix.benchmark": (params.matrix.benchmark, "benchmarks", params.benchmarks),
        "matrix.estimator": (params.matrix.estimator, "estimators", params.estimators),
        "texts.tasks": (tuple(params.texts.tasks), "benchmarks", params.benchmarks),
        **{
            f"models.{name}.source": ((model.source,), "sources", params.sources)
            for name, model in params.models.items()
        },
        **{
            f"benchmarks.{name}.samples": (tuple(found.samples.sources.values()), "sources", params.sources)
            for name, found in params.benchmarks.items()
        },
    }
    for key, (names, section, known) in named.items():
        for name in names:
            if name not in known:
                return f"{key} names '{name}', which is not in {section}; there are {', '.join(known)}"
    for name, tasks in params.texts.tasks.items():
        known = params.benchmarks[name].samples.tasks_of
        for task in tasks:
            if (known and task not in known) or tasks.count(task) > 1:
                return (
                    f"texts.tasks.{name} names '{task}' twice, or there is no such task; there are {', '.join(known)}"
                )
    titles = [params.report.titles.get(name, name) for name in params.baselines]
    titles += [params.benchmarks[name].shown.title for name in params.matrix.benchmark]
    for title in titles:
        if titles.count(title) > 1:
            return f"report.titles and benchmarks.*.shown.title call two things '{title}'; rename one"
    for name in params.report.titles:
        if name not in params.baselines:
            return f"report.titles names '{name}', which is not in baselines; there are {', '.join(params.baselines)}"
    if shown := [name for name in params.baselines if name in ("full", "oracle") or name.startswith("kvp-")]:
        return f"baselines.{shown[0]} has the name of another row of the results; call it otherwise"
    return None


def _seen_but_not_cached(params: Params) -> str | None:
    for name in params.train.agent.inputs:
        if not INPUTS.load(name).cached:
            return (
                f"train.agent.inputs names '{name}', but a policy ranks a cache, which holds no hidden states; "
                "only sensitivity.inputs may name it"
            )
    return None


def _trained_on_what_is_only_evaluated(params: Params) -> str | None:
    for name in params.matrix.trained_on:
        made = params.benchmarks[name].samples
        if not (made.trainable and made.sizes.train and made.sizes.validation):
            return f"matrix.trained_on names '{name}', which is for evaluation only; name it in benchmark"
        if name not in params.matrix.benchmark:
            return f"matrix.benchmark lacks '{name}', which matrix.trained_on names"
    return None


def _budgets_out_of_range(params: Params) -> str | None:
    protected = params.evaluation.n_sink + params.evaluation.n_recent
    for name in params.matrix.benchmark:
        found, budgets = params.benchmarks[name], params.budgets(name)
        if budgets[0] < protected:
            return f"benchmarks.{name}: the smallest budget, {budgets[0]}, is below the {protected} protected tokens"
        shortest = found.samples.shortest
        if found.evaluate.shorter == "refuse" and shortest is not None and budgets[-1] >= shortest:
            return (
                f"benchmarks.{name}: the largest budget, {budgets[-1]}, is not below its length of {shortest} tokens, "
                "so that nothing would be evicted"
            )
    return None
