"""What was run, as tables and sentences of the page: models, data, settings, licences. It knows no results."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import polars as pl

from pipeline.reporting.run import Run
from pipeline.reporting.table import Table, text_table

if TYPE_CHECKING:
    from pipeline.benchmarks.base import Benchmark
    from pipeline.samples.sample import Split

Records = Mapping[str, Mapping[str, Any]]
"""What stages wrote down: of ``model M`` its source, of ``check M`` its verdict, of ``data B`` its sources by role."""


def setup_tables(run: Run, evaluated: Mapping[str, int], prompts: pl.DataFrame, recorded: Records) -> list[Table]:
    """Models, data, settings and prompts.

    ``evaluated`` are the test samples of each benchmark that have results, ``prompts`` come from
    :func:`pipeline.reporting.read.read_prompts`.
    """
    models = [
        (name, _uri(recorded.get(f"model {name}", {})), run.models[name].dtype, _verdict(recorded.get(f"check {name}")))
        for name in run.matrix.model
    ]
    data = [
        (
            run.styles.title(name),
            _uri(recorded.get(f"data {name}", {}).get("source", {})),
            _tokens(benchmark),
            _split_size(benchmark, "train"),
            _split_size(benchmark, "validation"),
            str(evaluated.get(name, 0)),
        )
        for name, benchmark in run.benchmarks.items()
    ]
    settings = {
        "budgets (tokens kept per head)": ", ".join(map(str, run.budgets)),
        "always kept": f"first {run.protected[0]} and last {run.protected[1]} tokens",
        "training steps": f"{run.steps:,}",
        "estimators": ", ".join(run.matrix.estimator),
        "learning rate": f"{run.learning_rate:g}",
    }
    of_models = ["model", "source", "precision", "checked against transformers' own numbers"]
    of_data = ["benchmark", "source", "tokens", "training samples", "validation samples", "test samples evaluated"]
    return [
        text_table("Models", of_models, models, prose=("source", of_models[-1])),
        text_table("Data", of_data, data, prose=("source",)),
        text_table("Sweep and training", ["setting", "value"], settings.items()),
        _prompt_table(run, prompts),
    ]


def stand_ins(run: Run) -> list[str]:
    """What stands in for what of the paper, a sentence each."""
    named = [(f"model {name}", run.models[name].stands_in_for) for name in run.matrix.model]
    named += [(f"benchmark {run.styles.title(name)}", run.styles.stands_in_for(name)) for name in run.matrix.benchmark]
    return [f"The {what} stands in for {original}." for what, original in named if original]


def licence_table(run: Run, recorded: Records) -> Table:
    """Licence and pin of everything that the run was made from."""
    rows = [
        (
            what,
            str(source.get("licence", "not recorded")),
            _uri(source),
            str(source.get("sha256") or source.get("revision") or "not recorded")[:16],
        )
        for what, source in _sources(run, recorded)
    ]
    header = ["what", "licence", "source", "revision or sha256 (first 16 digits)"]
    return text_table("Models and data", header, rows, prose=("licence", "source"))


def _sources(run: Run, recorded: Records) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in run.matrix.model:
        yield f"model {name}", recorded.get(f"model {name}", {})
    for name, benchmark in run.benchmarks.items():
        for role in benchmark.sources:
            what = f"data {name}" if role == "source" else f"data {name}, {role.replace('_', ' ')}"
            yield what, recorded.get(f"data {name}", {}).get(role, {})


def _uri(source: Mapping[str, Any]) -> str:
    return str(source.get("uri", "not recorded"))


def _verdict(check: Mapping[str, Any] | None) -> str:
    if check is None:
        return "not checked"
    limit = "" if check["longest"] is None else f", in texts of up to {check['longest']:,} tokens"
    return f"{check['verdict']}: all within {check['tolerance']:g} in float32, finite in {check['dtype']}{limit}"


def _tokens(benchmark: "Benchmark") -> str:
    if benchmark.tokens is None or benchmark.shortest is None:
        return "as they are"
    shortest = "" if benchmark.shortest == benchmark.tokens else f"{benchmark.shortest:,} to "
    return f"{shortest}{benchmark.tokens:,}"


def _split_size(benchmark: "Benchmark", split: "Split") -> str:
    size, tasks = benchmark.sizes.of(split), len(benchmark.tasks_of)
    if not size:
        return "none"
    return f"{size} x {tasks} tasks" if tasks > 1 else str(size)


def _prompt_table(run: Run, prompts: pl.DataFrame) -> Table:
    rows = []
    by = ["model", "benchmark"]
    for (model, benchmark), part in prompts.sort(by).group_by(by, maintain_order=True):
        by_task = {row["task"]: row for row in part.iter_rows(named=True)}
        for task in run.in_order(str(benchmark), by_task):
            row = by_task[task]
            lengths = (f"{row[name]:,.0f}" for name in ("mean_tokens", "min_tokens", "max_tokens"))
            rows.append((task, run.styles.title(str(benchmark)), str(model), str(row["samples"]), *lengths))
    header = ["task", "benchmark", "model", "samples", "mean tokens", "shortest", "longest"]
    return text_table("Test prompts of each task", header, rows)
