"""Fill MLflow from files: every training and the evaluation of the matrix. A second call adds nothing."""

from pathlib import Path
from typing import Annotated

import typer

from stages._app import run


def track(
    policies: Annotated[Path, typer.Option(help="Where the train stage wrote.")] = Path("policies"),
    results: Annotated[Path, typer.Option(help="Where the results stage wrote.")] = Path("results"),
    reports: Annotated[Path, typer.Option(help="Where the report stage wrote.")] = Path("reports"),
    params_file: Annotated[Path, typer.Option("--params", help="The params file.")] = Path("params.yaml"),
) -> None:
    """Log what MLflow does not have yet: stages restored from DVC's cache have logged nothing."""
    from pipeline import mlflow_store, tracking
    from pipeline.params import load_params
    from pipeline.workdir import repository_root

    params = load_params(params_file)
    for model in params.matrix.model:
        for corpus in params.matrix.corpus:
            for estimator in params.matrix.estimator:
                tracking.log_training(policies / model / corpus / estimator)
    tracking.log_evaluation(results, reports, params)
    uri = mlflow_store.tracking_uri(repository_root())
    started = "" if uri.startswith("http") else " once `make ui` has started MLflow"
    typer.echo(f"Compare the runs in a browser{started}:", err=True)
    for line in mlflow_store.links(mlflow_store.server_address(uri)):
        typer.echo(line, err=True)


if __name__ == "__main__":
    run(track)
