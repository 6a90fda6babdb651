"""Stage `results`: merge the scores of the matrix into results/, and write what DVC compares (metrics/, plots/)."""

from stages import _paths
from stages._app import run


def main() -> None:
    """Write results/{evaluation,cost}.parquet, metrics/*.json and plots/*.csv."""
    from itertools import product
    from typing import Any

    from pipeline.closure import Code
    from pipeline.files import atomic_write, write_json
    from pipeline.matrix import MatrixParams
    from pipeline.reporting import aggregate, summaries
    from pipeline.reporting.params import ReportParams, ShownAs
    from pipeline.reporting.read import read_curves, read_tables
    from pipeline.reporting.styles import Styles
    from pipeline.section import read
    from pipeline.tables import COST, EVALUATION
    from pipeline.work import publish, work_directory

    matrix, report = read("matrix", MatrixParams), read("report", ReportParams)
    shown = {name: read(f"benchmarks.{name}.shown", ShownAs) for name in matrix.trained_on}
    baselines = {name: entry["sees_attention"] for name, entry in read("baselines", dict[str, Any]).items()}
    styles = Styles(matrix.trained_on, matrix.estimator, shown, baselines, report.titles)
    pairs = list(product(matrix.model, matrix.benchmark))
    policies = product(matrix.model, matrix.trained_on, matrix.estimator)
    # Only entries of the matrix are read: what a dropped one has left on disk must not reach a report.
    evaluation = read_tables([_paths.scores(*pair) for pair in pairs], EVALUATION)
    cost = read_tables([_paths.answers(*pair) / "cost.parquet" for pair in pairs], COST)
    training = aggregate.training_table(read_curves({it: _paths.policy(*it) / "curves.parquet" for it in policies}))
    scores = aggregate.score_table(evaluation, report)
    costs = aggregate.cost_table(aggregate.normalised_costs(cost, evaluation), report)
    work = work_directory("results", {}, [], Code(__file__))
    for name, frame in (("evaluation", evaluation), ("cost", cost)):
        with atomic_write(work / _paths.RESULTS / f"{name}.parquet") as temporary:
            frame.write_parquet(temporary)
    write_json(work / _paths.METRICS / "scores.json", summaries.score_metrics(scores))
    write_json(work / _paths.METRICS / "cost.json", summaries.cost_metrics(costs))
    trained = summaries.training_metrics(training, aggregate.steps_table(training))
    write_json(work / _paths.METRICS / "training.json", trained)
    plots = {
        "accuracy_vs_budget": summaries.score_plot(scores, "accuracy", styles),
        "perplexity_vs_budget": summaries.score_plot(scores, "perplexity", styles),
        "cost_vs_budget": summaries.cost_plot(aggregate.cost_curves(cost), styles),
        "training_curves": summaries.training_plot(training),
    }
    for name, frame in plots.items():
        with atomic_write(work / _paths.PLOTS / f"{name}.csv") as temporary:
            frame.write_csv(temporary)
    for folder in (_paths.RESULTS, _paths.METRICS, _paths.PLOTS):
        for file in sorted((work / folder).iterdir()):
            publish(file, folder / file.name)


if __name__ == "__main__":
    run(main)
