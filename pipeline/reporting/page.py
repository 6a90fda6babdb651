"""The report as one HTML file without network access: images, style and the one script inline.

It arranges tables, figures and findings; the words of the page are in ``page.html.jinja``. Without scripts all of it
can be read but the block of coloured texts (``tokens.html.jinja``).
"""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
from markupsafe import Markup

from pipeline.params import AnyCorpusParams, LongBenchParams, Params, RulerParams
from pipeline.reporting import findings, names, tables
from pipeline.reporting.figures import Drawing

TEMPLATES = Path(__file__).parent
TITLE = "Learned KV-cache eviction: what this run shows"
INTRODUCTION = (
    "A small policy per attention head ranks the tokens of a key-value cache once, by how much attention they will "
    "still receive; any budget then keeps a prefix of that ranking (Moschella, Manduchi and Sener, Learning to Evict "
    "from Key-Value Cache, arXiv 2602.10238). This page compares such policies, KVP_R trained on RULER and KVP_S "
    "trained on dialogues, with other ways to evict. The rloo estimator is the paper's; the exact one computes the "
    "same policy gradient in closed form."
)


@dataclass(frozen=True)
class Cell:
    """One cell: its text, the interval below it, and a CSS class."""

    text: str
    interval: str = ""
    look: str = ""


@dataclass(frozen=True)
class Row:
    """One row; KVP's own rows are marked."""

    cells: list[Cell]
    ours: bool = False


@dataclass(frozen=True)
class Table:
    """One table of the page."""

    title: str
    header: list[str]
    rows: list[Row]
    note: str = ""


@dataclass(frozen=True)
class Numbers:
    """Every table of numbers the page shows (``tables.py`` describes the columns)."""

    scores: pl.DataFrame
    tasks: pl.DataFrame
    score_differences: pl.DataFrame
    costs: pl.DataFrame
    cost_differences: pl.DataFrame
    steps: pl.DataFrame
    prompts: pl.DataFrame


def render(
    params: Params,
    numbers: Numbers,
    drawings: Sequence[tuple[Drawing, Path]],
    recorded: dict[str, dict[str, Any]],
    texts: dict[str, Any],
) -> str:
    """The page.

    Parameters
    ----------
    drawings
        Figures with the PNG each was drawn to.
    recorded
        What the fetching stages recorded about sources, and the check about models, by what they are (see :func:`recorded_sources`).
    texts
        The block of coloured texts (``tokens.page_block``).
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    table_template = environment.get_template("table.html.jinja")

    def render_table(table: Table) -> Markup:
        return Markup(table_template.render(table=table))

    several_tasks = not numbers.tasks.is_empty()
    return environment.get_template("page.html.jinja").render(
        title=TITLE,
        introduction=INTRODUCTION,
        findings=findings.headline(
            numbers.scores, numbers.score_differences, numbers.costs, numbers.cost_differences, numbers.steps
        ),
        confidence=f"{params.report.confidence:.0%}",
        resamples=f"{params.report.bootstrap_samples:,}",
        stratified=", drawn within each task, tasks of one sample together" if several_tasks else "",
        setup=_setup_tables(params, numbers, recorded),
        stand_ins=_stand_ins(params),
        figures=[
            {
                "title": drawing.title,
                "paper": drawing.paper,
                "caption": drawing.caption,
                "data": base64.b64encode(path.read_bytes()).decode(),
            }
            for drawing, path in drawings
        ],
        texts=texts,
        tables=_number_tables(numbers),
        licences=_licence_table(params, recorded),
        render_table=render_table,
    )


def recorded_sources(models: Path, samples: Path, checks: Path, params: Params) -> dict[str, dict[str, Any]]:
    """The source.json files next to the models and samples of the matrix, and the models' checks, where they exist."""
    paths = {f"model {model}": models / model / "source.json" for model in params.matrix.model}
    paths |= {f"check {model}": checks / f"{model}.json" for model in params.matrix.model}
    paths |= {
        f"data {corpus}": samples / params.matrix.model[0] / corpus / "source.json"
        for corpus in params.matrix.benchmark
    }
    return {what: json.loads(path.read_text()) for what, path in paths.items() if path.is_file()}


def _setup_tables(params: Params, numbers: Numbers, recorded: dict[str, dict[str, Any]]) -> list[Table]:
    models = Table(
        "Models",
        ["model", "source", "precision", "checked against transformers' own numbers"],
        [
            Row(
                [
                    Cell(name),
                    Cell(params.models[name].source.uri, look="text"),
                    Cell(params.models[name].dtype),
                    Cell(_verdict(recorded.get(f"check {name}")), look="text"),
                ]
            )
            for name in params.matrix.model
        ],
    )
    counts = dict(numbers.scores.group_by("benchmark").agg(pl.col("samples").max()).iter_rows())
    data = Table(
        "Data",
        ["corpus", "source", "tokens", "training samples", "validation samples", "test samples evaluated"],
        [
            Row(
                [
                    Cell(names.corpus_title(name)),
                    Cell(corpus.source.uri, look="text"),
                    Cell("as they are" if corpus.kind == "choice" else f"{corpus.length:,}"),
                    Cell(_split_size(corpus, "train")),
                    Cell(_split_size(corpus, "validation")),
                    Cell(str(counts.get(name, 0))),
                ]
            )
            for name in params.matrix.benchmark
            for corpus in [params.corpora[name]]
        ],
    )
    budgets = ", ".join(map(str, params.evaluation.budgets))
    sweep = Table(
        "Sweep and training",
        ["setting", "value"],
        [
            Row([Cell("budgets (tokens kept per head)"), Cell(budgets)]),
            Row(
                [
                    Cell("always kept"),
                    Cell(f"first {params.evaluation.n_sink} and last {params.evaluation.n_recent} tokens"),
                ]
            ),
            Row([Cell("training steps"), Cell(f"{params.train.steps:,}")]),
            Row([Cell("estimators"), Cell(", ".join(params.matrix.estimator))]),
            Row([Cell("learning rate"), Cell(f"{params.train.learning_rate:g}")]),
        ],
    )
    return [models, data, sweep, *_prompt_tables(numbers.prompts)]


def _verdict(check: dict[str, Any] | None) -> str:
    if check is None:
        return "not checked"
    limit = "" if check["longest"] is None else f", in texts of up to {check['longest']:,} tokens"
    return f"{check['verdict']}: all within {check['tolerance']:g} in float32, finite in {check['dtype']}{limit}"


def _split_size(corpus: AnyCorpusParams, split: str) -> str:
    size = getattr(corpus.samples, split, None)
    if size is None:
        return "none"
    several = isinstance(corpus, RulerParams | LongBenchParams) and len(corpus.tasks) > 1
    return f"{size} x {len(corpus.tasks)} tasks" if several else str(size)  # type: ignore[union-attr]


def _prompt_tables(prompts: pl.DataFrame) -> list[Table]:
    if prompts.is_empty():
        return []
    rows = sorted(
        prompts.iter_rows(named=True), key=lambda row: (row["model"], row["corpus"], *names.task_order(row["task"]))
    )
    return [
        Table(
            "Test prompts of each task",
            ["task", "corpus", "model", "samples", "mean tokens", "shortest", "longest"],
            [
                Row(
                    [
                        Cell(row["task"]),
                        Cell(names.corpus_title(row["corpus"])),
                        Cell(row["model"]),
                        Cell(str(row["samples"])),
                        Cell(f"{row['mean_tokens']:,.0f}"),
                        Cell(f"{row['min_tokens']:,}"),
                        Cell(f"{row['max_tokens']:,}"),
                    ]
                )
                for row in rows
            ],
        )
    ]


def _stand_ins(params: Params) -> list[str]:
    named = [(f"model {name}", params.models[name].stands_in_for) for name in params.matrix.model]
    named += [
        (f"corpus {names.corpus_title(name)}", params.corpora[name].stands_in_for) for name in params.matrix.benchmark
    ]
    return [f"The {what} stands in for {original}." for what, original in named if original]


def _number_tables(numbers: Numbers) -> list[Table]:
    found = []
    for (model, benchmark, metric), part in numbers.scores.group_by(
        "model", "benchmark", "metric", maintain_order=True
    ):
        found.append(
            _score_table(f"{names.corpus_title(str(benchmark))}: {metric} per budget ({model})", part, str(metric))
        )
        differences = numbers.score_differences.filter(
            pl.col("model") == model, pl.col("benchmark") == benchmark, pl.col("metric") == metric
        )
        lower = metric in names.LOWER_IS_BETTER
        found += _difference_tables(
            f"{names.corpus_title(str(benchmark))}: difference in {metric} ({model})", differences, "budget", lower
        )
    for (model, corpus), part in numbers.costs.group_by("model", "corpus", maintain_order=True):
        title = names.corpus_title(str(corpus))
        found.append(_cost_table(f"{title}: normalised cost, 1 = best order ({model})", part))
        differences = numbers.cost_differences.filter(pl.col("model") == model, pl.col("corpus") == corpus)
        found += _difference_tables(
            f"{names.corpus_title(str(corpus))}: difference in normalised cost ({model})", differences, "scope", True
        )
    if not numbers.steps.is_empty():
        found.append(_steps_table(numbers.steps))
    for (model, benchmark, metric), part in numbers.tasks.group_by("model", "benchmark", "metric", maintain_order=True):
        title = f"{names.corpus_title(str(benchmark))}: {metric} of each task, mean over budgets ({model})"
        found.append(_task_table(title, part))
    return found


def _score_table(title: str, scores: pl.DataFrame, metric: str) -> Table:
    budgets = scores["budget"].drop_nulls().unique().sort().to_list()
    rows = []
    for pair in tables.series(scores):
        line = {row["budget"]: row for row in tables.select(scores, *pair).iter_rows(named=True)}
        # No eviction has one value, whatever the budget.
        cells = [_interval_cell(line[None] if None in line else line.get(budget), metric) for budget in budgets]
        rows.append(_policy_row(pair, cells))
    return Table(title, ["policy", *(f"{budget} tokens" for budget in budgets)], rows)


def _cost_table(title: str, costs: pl.DataFrame) -> Table:
    scopes = [scope for scope in tables.SCOPES if scope in costs["scope"]]
    rows = []
    for pair in tables.series(costs):
        line = {row["scope"]: row for row in tables.select(costs, *pair).iter_rows(named=True)}
        cells = [_interval_cell(line.get(scope), "normalised_cost") for scope in scopes]
        rows.append(_policy_row(pair, cells))
    return Table(
        title,
        ["policy", *scopes],
        rows,
        "Future importance of evicted tokens, summed over all budgets, over the same sum for the best order. Cache "
        "sizes: in the middle of the sequence, and the whole prompt.",
    )


def _difference_tables(title: str, differences: pl.DataFrame, at: str, lower_is_better: bool) -> list[Table]:
    found = []
    for pair in tables.series(differences):
        part = tables.select(differences, *pair)
        columns = (
            part["budget"].unique().sort().to_list()
            if at == "budget"
            else [scope for scope in tables.SCOPES if scope in part["scope"]]
        )
        rivals = sorted(part.select("baseline", "baseline_trained_on").unique().rows(), key=lambda r: names.order(*r))
        rows = []
        for baseline, trained_on in rivals:
            line = {row[at]: row for row in part.filter(pl.col("baseline") == baseline).iter_rows(named=True)}
            rows.append(
                Row(
                    [
                        Cell(names.label(baseline, trained_on)),
                        *(_difference_cell(line[c], lower_is_better) for c in columns),
                    ]
                )
            )
        header = [f"{column} tokens" if at == "budget" else str(column) for column in columns]
        found.append(
            Table(
                f"{title}: {names.label(*pair)} minus baseline",
                ["baseline", *header],
                rows,
                "Paired on the same samples. Shaded: the interval excludes zero (green: KVP is better, orange: worse).",
            )
        )
    return found


def _task_table(title: str, tasks: pl.DataFrame) -> Table:
    order = sorted(tasks["task"].unique().to_list(), key=names.task_order)
    metric = str(tasks["metric"][0])
    rows = []
    for pair in tables.series(tasks):
        means = dict(tables.select(tasks, *pair).group_by("task").agg(pl.col("mean").mean()).iter_rows())
        cells = [Cell(findings.format_value(means[task], metric)) for task in order]
        rows.append(_policy_row(pair, cells))
    note = "Few samples per task: read rows, not single cells. Values per budget are in figure 13."
    return Table(title, ["policy", *order], rows, note)


def _steps_table(steps: pl.DataFrame) -> Table:
    rows = [
        Row(
            [
                Cell(names.corpus_title(row["corpus"])),
                Cell(row["model"]),
                Cell(str(row["rloo_steps"])),
                Cell(f"{row['rloo_cost']:.3f}"),
                Cell("not reached" if row["exact_steps"] is None else str(row["exact_steps"])),
                Cell(f"{row['exact_cost']:.3f}"),
            ]
        )
        for row in steps.iter_rows(named=True)
    ]
    header = ["corpus", "model", "rloo steps", "rloo final cost", "exact reaches it at step", "exact final cost"]
    note = "Normalised cost on validation sequences, mean over heads, at the steps that were validated."
    return Table("Steps until the exact gradient reaches what rloo ends with", header, rows, note)


def _licence_table(params: Params, recorded: dict[str, dict[str, Any]]) -> Table:
    sources = {f"model {name}": params.models[name].source for name in params.matrix.model}
    sources |= {f"data {name}": params.corpora[name].source for name in params.matrix.benchmark}
    rows = []
    for what, source in sources.items():
        found = recorded.get(what, {})
        pin = found.get("sha256") or found.get("revision") or source.sha256 or source.revision or "not pinned"
        licence = str(found.get("licence") or source.licence)
        rows.append(Row([Cell(what), Cell(licence, look="text"), Cell(source.uri, look="text"), Cell(str(pin)[:16])]))
    return Table("Models and data", ["what", "licence", "source", "revision or sha256 (first 16 digits)"], rows)


def _policy_row(pair: tuple[str, str | None], cells: list[Cell]) -> Row:
    look = names.style(*pair)
    return Row([Cell(look.label), *cells], ours=look.kind == "kvp")


def _interval_cell(row: dict[str, Any] | None, metric: str) -> Cell:
    if row is None:
        return Cell("")
    shown: Callable[[float], str] = lambda value: findings.format_value(value, metric)  # noqa: E731
    return Cell(shown(row["mean"]), findings.interval(row, shown))


def _difference_cell(row: dict[str, Any], lower_is_better: bool) -> Cell:
    outcome = findings.verdict(row["low"], row["high"], lower_is_better)
    look = "" if outcome == "undecided" else outcome
    return Cell(f"{row['difference']:+.2f}", findings.interval(row, "{:+.2f}".format), look)
