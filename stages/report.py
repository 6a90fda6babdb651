"""Stage `report`: draw the figures and write the page."""

from stages import _paths
from stages._app import run


def main() -> None:
    """Write reports/figures/*.png and the self-contained reports/index.html."""
    from itertools import product
    from typing import Any

    from pipeline.benchmarks.base import read_benchmark
    from pipeline.closure import Code
    from pipeline.files import write_text
    from pipeline.matrix import MatrixParams
    from pipeline.models.params import ModelParams
    from pipeline.reporting import figures, page, text_figures
    from pipeline.reporting.drawing import save_all
    from pipeline.reporting.numbers import make_numbers
    from pipeline.reporting.params import ReportParams, ShownAs
    from pipeline.reporting.read import read_curves, read_prompts, read_records, read_table
    from pipeline.reporting.run import Run
    from pipeline.reporting.styles import Styles
    from pipeline.reporting.texts import page_block, read_texts
    from pipeline.section import Budgets, read
    from pipeline.tables import COST, EVALUATION
    from pipeline.work import publish, work_directory

    matrix, report = read("matrix", MatrixParams), read("report", ReportParams)
    shown = {name: read(f"benchmarks.{name}.shown", ShownAs) for name in matrix.benchmark}
    baselines = {name: entry["sees_attention"] for name, entry in read("baselines", dict[str, Any]).items()}
    styles = Styles(matrix.trained_on, matrix.estimator, shown, baselines, report.titles)
    models = read("models", dict[str, ModelParams])
    benchmarks = {name: read_benchmark(name) for name in matrix.benchmark}
    budgets = read("evaluation.budgets", Budgets)
    protected = (read("evaluation.n_sink", int), read("evaluation.n_recent", int))
    steps, learning_rate = read("train.steps", int), read("train.learning_rate", float)
    this = Run(matrix, report, styles, models, benchmarks, budgets, protected, steps, learning_rate)
    evaluation = read_table(_paths.RESULTS / "evaluation.parquet", EVALUATION)
    cost = read_table(_paths.RESULTS / "cost.parquet", COST)
    policies = product(matrix.model, matrix.trained_on, matrix.estimator)
    curves = read_curves({policy: _paths.policy(*policy) / "curves.parquet" for policy in policies})
    prompts = {pair: _paths.samples(*pair, "test") for pair in product(matrix.model, matrix.benchmark)}
    tokens = {pair: _paths.texts(*pair) / "tokens.parquet" for pair in product(matrix.model, matrix.trained_on)}
    records = {f"model {name}": _paths.model(name) / "source.json" for name in matrix.model}
    records |= {f"check {name}": _paths.check(name) for name in matrix.model}
    records |= {f"data {name}": _paths.samples(matrix.model[0], name) / "source.json" for name in matrix.benchmark}
    numbers = make_numbers(evaluation, cost, curves, this)
    texts = read_texts(tokens, prompts, styles)
    work = work_directory("report", {}, [], Code(__file__))
    drawn = save_all(figures.drawings(numbers, this) + text_figures.drawings(texts, this), work / "figures")
    html = page.render(this, numbers, read_prompts(prompts), drawn, read_records(records), page_block(texts, this))
    write_text(work / "index.html", html)
    publish(work / "index.html", _paths.REPORTS / "index.html")
    publish(work / "figures", _paths.REPORTS / "figures")


if __name__ == "__main__":
    run(main)
