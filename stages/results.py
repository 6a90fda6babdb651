"""Merge the evaluations of the matrix into results/, and write what DVC compares (metrics/, plots/)."""

from pathlib import Path
from typing import Annotated

import typer

from stages._app import run

RESULTS = Path("results")
METRICS = Path("metrics")
PLOTS = Path("plots")


def results(
    evaluations: Annotated[Path, typer.Option(help="Where the evaluate stage wrote.")] = Path("evaluations"),
    policies: Annotated[Path, typer.Option(help="Where the train stage wrote.")] = Path("policies"),
    params_file: Annotated[Path, typer.Option("--params", help="The params file.")] = Path("params.yaml"),
) -> None:
    """Merge the evaluation tables and write metrics and plots for DVC."""
    from pipeline.params import load_params
    from pipeline.reporting import summaries, tables
    from pipeline.workdir import atomic_write, publish, work_directory, write_json

    params = load_params(params_file)
    evaluation = tables.read_evaluations(evaluations, params.matrix)
    cost = tables.read_costs(evaluations, params.matrix)
    training = tables.training_table(tables.read_curves(policies, params.matrix))
    scores = tables.score_table(evaluation, params.report)
    costs = tables.cost_table(tables.normalised_costs(cost, evaluation), params.report)

    work = work_directory("results", {"matrix": params.matrix.model_dump(mode="json")}, [])
    for name, frame in (("evaluation", evaluation), ("cost", cost)):
        with atomic_write(work / RESULTS / f"{name}.parquet") as temporary:
            frame.write_parquet(temporary)
    write_json(work / METRICS / "scores.json", summaries.score_metrics(scores))
    write_json(work / METRICS / "cost.json", summaries.cost_metrics(costs))
    write_json(work / METRICS / "training.json", summaries.training_metrics(training, tables.steps_table(training)))
    plots = {
        "accuracy_vs_budget": summaries.score_plot(scores, "accuracy"),
        "perplexity_vs_budget": summaries.score_plot(scores, "perplexity"),
        "cost_vs_budget": summaries.cost_plot(tables.cost_curves(cost)),
        "training_curves": summaries.training_plot(training),
    }
    for name, frame in plots.items():
        with atomic_write(work / PLOTS / f"{name}.csv") as temporary:
            frame.write_csv(temporary)
    for folder in (RESULTS, METRICS, PLOTS):
        for file in sorted((work / folder).iterdir()):
            publish(file, folder / file.name)


if __name__ == "__main__":
    run(results)
