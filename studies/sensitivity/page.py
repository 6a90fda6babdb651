"""The study's page: one HTML file that stands alone, in the style of the main report."""

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2
import polars as pl

from pipeline.params import Params
from pipeline.reporting.drawing import Drawing
from pipeline.reporting.findings import verdict
from pipeline.reporting.page import TEMPLATES
from pipeline.reporting.table import Cell, Row, Table, text_table
from studies.sensitivity.columns import BASE
from studies.sensitivity.figures import INPUTS, estimator_words
from studies.sensitivity.params import StudySensitivity, titles, training_length
from studies.sensitivity.tables import NOT_LONGER, OWN, SAME_BENCHMARK, titled

TITLE = "Learned KV-cache eviction: what the held-out cost depends on"
INTRODUCTION = (
    "Small trainings that each change one thing: how many sequences a policy learns from, how long, how wide its "
    "agents are, what they see, and which loss they follow; and the policies on another benchmark and on longer "
    "sequences than they were trained on. The base variant is a shortened training of the main report's policy with "
    "the exact policy gradient, on some of its layers. The sorting surrogate is the one that the paper compares with: "
    "soft ranks of Blondel et al. (arXiv 2002.08871), regressed onto the ranks by importance."
)
# Axis of the study -> words for one of its values.
WORDS = {
    "training_fraction": "share of the training sequences: {}",
    "steps": "training steps: {}",
    "hidden_width": "hidden width: {}",
    "inputs": "inputs: {}",
    "estimator": "estimator: {}",
}


def render(
    params: Params, study: StudySensitivity, summary: pl.DataFrame, drawn: Sequence[tuple[Drawing, Path]]
) -> str:
    """The page, from the table of ``tables.summary_table`` and the figures with the PNG each was drawn to."""
    summary = titled(summary, titles(params))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("sensitivity.html.jinja").render(
        title=TITLE,
        introduction=INTRODUCTION,
        findings=_findings(summary),
        confidence=f"{params.report.confidence:.0%}",
        seeds=study.seeds,
        setup=[_setup(params, study)],
        figures=[(drawing, base64.b64encode(path.read_bytes()).decode()) for drawing, path in drawn],
        tables=[*_axis_tables(summary), *_transfer_tables(summary), *_length_tables(summary)],
    )


def _words(axis: str, value: str) -> str:
    if axis == "inputs":
        inputs, comma, rest = value.partition(",")
        value = INPUTS[inputs] + comma + rest
    return WORDS[axis].format(value)


def _findings(summary: pl.DataFrame) -> list[str]:
    return [*_loss_findings(summary), *_input_findings(summary)]


def _loss_findings(summary: pl.DataFrame) -> list[str]:
    sentences = []
    losses = summary.filter(pl.col("axis") == BASE[0], OWN)
    for (model, benchmark), part in losses.group_by("model", "benchmark", maintain_order=True):
        rows = {row["value"]: row for row in part.iter_rows(named=True)}
        estimators = dict.fromkeys(value.partition(" ")[0] for value in rows)
        same = ", ".join(
            f"{estimator_words(name)} {rows[name]['mean']:.3f}"
            + (f" ({_difference(rows[name])})" if name != BASE[1] else "")
            for name in estimators
        )
        best = []
        for name in estimators:
            of_name = [row for value, row in rows.items() if value.partition(" ")[0] == name]
            least = min(of_name, key=lambda row: row["mean"])
            rate = least["value"].partition(" ")[2]
            best.append(
                f"{estimator_words(name)} {least['mean']:.3f} at " + (f"rate {rate}" if rate else "the base's rate")
            )
        where = f"{benchmark}, {model}"
        sentences.append(f"{where}, cost after training at the base's learning rate: {same}.")
        sentences.append(f"{where}, each at its best of the learning rates: {', '.join(best)}.")
    return sentences


def _input_findings(summary: pl.DataFrame) -> list[str]:
    """A sentence for each benchmark and length on which agents with several inputs were evaluated."""
    sentences = []
    inputs = summary.filter(pl.col("axis") == "inputs", SAME_BENCHMARK)
    for (model, benchmark, trained, length), part in inputs.group_by(
        "model", "benchmark", "trained_length", "length", maintain_order=True
    ):
        costs = ", ".join(
            f"{_words('inputs', row['value']).removeprefix('inputs: ')} {row['mean']:.3f}"
            for row in part.sort("mean", maintain_order=True).iter_rows(named=True)
        )
        where = f"trained at {trained:,} tokens and evaluated at {length:,}" if trained != length else "cost"
        sentences.append(f"{benchmark}, {model}, {where}, by inputs from the least: {costs}.")
    return sentences


def _difference(row: dict[str, float]) -> str:
    return f"{row['difference']:+.3f}, interval {row['difference_low']:+.3f} to {row['difference_high']:+.3f}"


def _setup(params: Params, study: StudySensitivity) -> Table:
    train, shown = params.train, titles(params)
    settings = {
        "models": ", ".join(params.matrix.model),
        "trained on": ", ".join(shown[name] for name in params.matrix.trained_on),
        "layers, with all their KV heads": ", ".join(map(str, study.layers)),
        "seeds": str(study.seeds),
        "base variant": f"exact gradient, {study.base_steps:,} steps, learning rate {train.learning_rate:g}, width "
        f"{train.agent.hidden_width}, inputs: {', '.join(train.agent.inputs)}",
        "longer validation sequences": "; ".join(
            f"{shown[name]}: {longer.length:,} tokens, {longer.samples} of each task, for the policies "
            f"trained at {training_length(params, name):,}"
            for name, longer in study.longer.items()
        )
        or "none",
        "learning rates of the estimators (our choice)": ", ".join(
            f"{factor * train.learning_rate:g}" for factor in study.rate_factor
        ),
    }
    return text_table("The study", ["setting", "value"], settings.items(), prose=("value",))


def _axis_tables(summary: pl.DataFrame) -> list[Table]:
    found = []
    own = summary.filter(OWN)
    for (model, benchmark), part in own.group_by("model", "benchmark", maintain_order=True):
        rows = []
        for row in part.iter_rows(named=True):
            rows.append(
                Row(
                    [
                        Cell(_words(row["axis"], row["value"])),
                        Cell(f"{row['mean']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"),
                        _difference_cell(row),
                    ],
                    ours=(row["axis"], row["value"]) == BASE,
                )
            )
        found.append(
            Table(
                f"{benchmark}: normalised cost at the end of training, 1 = best order ({model})",
                ["variant", "cost", "minus base variant"],
                rows,
                "Shaded: the interval of the difference excludes zero (green: better than the base variant, "
                "orange: worse). Rows with difference 0 are the base variant itself.",
            )
        )
    return found


def _difference_cell(row: dict[str, float]) -> Cell:
    low, high = row["difference_low"], row["difference_high"]
    if low == high == 0:
        return Cell("0")
    outcome = verdict(low, high, lower_is_better=True)
    look = "" if outcome == "undecided" else outcome
    return Cell(f"{row['difference']:+.3f}", f"{low:+.3f} to {high:+.3f}", look)


def _transfer_tables(summary: pl.DataFrame) -> list[Table]:
    found = []
    base = summary.filter(pl.col("axis") == BASE[0], pl.col("value") == BASE[1], NOT_LONGER)
    for (model,), part in base.group_by("model", maintain_order=True):
        benchmarks = part["benchmark"].unique(maintain_order=True).to_list()
        rows = []
        for (trained_on,), line in part.group_by("trained_on", maintain_order=True):
            of_line = {row["benchmark"]: row for row in line.iter_rows(named=True)}
            cells = [
                Cell(f"{of_line[name]['mean']:.3f}", f"{of_line[name]['low']:.3f} to {of_line[name]['high']:.3f}")
                for name in benchmarks
            ]
            rows.append(Row([Cell(f"trained on {trained_on}"), *cells]))
        found.append(
            Table(
                f"Transfer between benchmarks: normalised cost of the base variant ({model})",
                ["", *(f"evaluated on {name}" for name in benchmarks)],
                rows,
            )
        )
    return found


def _length_tables(summary: pl.DataFrame) -> list[Table]:
    found = []
    longer = summary.filter(SAME_BENCHMARK, ~OWN, pl.col("axis") == "inputs")
    own = summary.filter(OWN).select(
        "model", "benchmark", "axis", "value", short="mean", short_low="low", short_high="high"
    )
    both = longer.join(own, on=["model", "benchmark", "axis", "value"], maintain_order="left")
    for (model, benchmark, trained, length), part in both.group_by(
        "model", "benchmark", "trained_length", "length", maintain_order=True
    ):
        rows = [
            Row(
                [
                    Cell(_words("inputs", row["value"])),
                    Cell(f"{row['short']:.3f}", f"{row['short_low']:.3f} to {row['short_high']:.3f}"),
                    Cell(f"{row['mean']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"),
                    _difference_cell(row),
                ]
            )
            for row in part.iter_rows(named=True)
        ]
        found.append(
            Table(
                f"Transfer between lengths: {benchmark}, trained at {trained:,} tokens ({model})",
                ["variant", f"cost at {trained:,}", f"cost at {length:,}", f"minus base variant, at {length:,}"],
                rows,
                "Costs of different lengths are divided by different best orders: compare variants within a column.",
            )
        )
    return found
