"""Draw the figures and write the page: reports/figures/*.png and reports/index.html."""

from pathlib import Path
from typing import Annotated

import typer

from stages._app import run

REPORTS = Path("reports")


def report(
    results: Annotated[Path, typer.Option(help="Where the results stage wrote.")] = Path("results"),
    policies: Annotated[Path, typer.Option(help="Where the train stage wrote.")] = Path("policies"),
    samples: Annotated[Path, typer.Option(help="Where the samples stage wrote.")] = Path("samples"),
    models: Annotated[Path, typer.Option(help="Where the model stage wrote.")] = Path("models"),
    examples: Annotated[Path, typer.Option(help="Where the examples stage wrote.")] = Path("examples"),
    checks: Annotated[Path, typer.Option(help="Where the check stage wrote.")] = Path("checks"),
    params_file: Annotated[Path, typer.Option("--params", help="The params file.")] = Path("params.yaml"),
) -> None:
    """Show the results as figures and one self-contained page."""
    from pipeline.params import load_params
    from pipeline.reporting import figures, page, tables, tokens
    from pipeline.workdir import publish, work_directory, write_text

    params = load_params(params_file)
    evaluation = tables.read_table(results / "evaluation.parquet", tables.EVALUATION_COLUMNS)
    cost = tables.read_table(results / "cost.parquet", tables.COST_COLUMNS)
    training = tables.training_table(tables.read_curves(policies, params.matrix))
    normalised = tables.normalised_costs(cost, evaluation)
    files = {
        (model, corpus): samples / model / corpus / "test.parquet"
        for model in params.matrix.model
        for corpus in params.matrix.benchmark
    }
    numbers = page.Numbers(
        scores=tables.score_table(evaluation, params.report),
        tasks=tables.task_table(evaluation, params.report),
        score_differences=tables.score_difference_table(evaluation, params.report),
        costs=tables.cost_table(normalised, params.report),
        cost_differences=tables.cost_difference_table(normalised, params.report),
        steps=tables.steps_table(training),
        prompts=tables.prompt_table({entry: path for entry, path in files.items() if path.is_file()}),
    )
    drawings = figures.drawings(
        figures.Tables(numbers.scores, numbers.tasks, tables.cost_curves(cost), training), params
    )
    texts = tokens.read_texts(examples, samples, params.matrix)
    budget = params.evaluation.budgets[len(params.evaluation.budgets) // 2]
    drawings += tokens.drawings(texts, budget, params.report)
    drawings.sort(key=lambda drawing: drawing.file)
    block = tokens.page_block(texts, budget, params.report)

    identity = {"matrix": params.matrix.model_dump(mode="json"), "report": params.report.model_dump(mode="json")}
    work = work_directory("report", identity, [results, examples])
    drawn = [(drawing, figures.save(drawing, work / "figures")) for drawing in drawings]
    recorded = page.recorded_sources(models, samples, checks, params)
    write_text(work / "index.html", page.render(params, numbers, drawn, recorded, block))
    publish(work / "index.html", REPORTS / "index.html")
    publish(work / "figures", REPORTS / "figures")


if __name__ == "__main__":
    run(report)
