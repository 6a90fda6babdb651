"""Fill MLflow from files: every training and the evaluation of the matrix. A second call adds nothing."""

import typer

from stages import _paths
from stages._app import run


def main() -> None:
    """Log what MLflow does not have yet: stages restored from DVC's cache have logged nothing."""
    from pipeline.files import repository_root
    from pipeline.params import load_params
    from pipeline.tracking.evaluation import log_evaluation
    from pipeline.tracking.experiments import links
    from pipeline.tracking.store import server_address, tracking_uri
    from pipeline.tracking.trainings import log_training

    params = load_params()
    matrix = params.matrix
    for model in matrix.model:
        for policy in _paths.policies(model, matrix.trained_on, matrix.estimator).values():
            log_training(policy)
    log_evaluation(_paths.RESULTS, _paths.REPORTS, params)
    uri = tracking_uri(repository_root())
    started = "" if uri.startswith("http") else " once `make ui` has started MLflow"
    typer.echo(f"Compare the runs in a browser{started}:", err=True)
    for line in links(server_address(uri)):
        typer.echo(line, err=True)


if __name__ == "__main__":
    run(main)
