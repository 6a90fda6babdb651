"""Start MLflow's pages on this computer, and say where the trainings and the sweep are in them."""

import os
import sys
from typing import Annotated

import typer

from stages._app import run


def main(port: Annotated[int, typer.Option(help="Port on this computer.", min=1, max=65535)] = 5000) -> None:
    """Show what is logged; Ctrl-C ends it."""
    from pipeline.errors import PipelineError
    from pipeline.files import repository_root
    from pipeline.tracking.experiments import links
    from pipeline.tracking.store import server_address, shown_uri, tracking_uri

    uri = tracking_uri(repository_root())
    lines = links(server_address(uri, port))
    if not lines:
        raise PipelineError(f"MLflow at {shown_uri(uri)} has no runs yet; run make repro, or python -m stages.track.")
    typer.echo("Open in a browser:", err=True)
    typer.echo("\n".join(lines), err=True)
    if uri.startswith("http"):
        return  # its server is running
    sys.stderr.flush()
    # No answer on other addresses than this computer's: the pages ask for no password.
    command = ["mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1"]  # for one reader; MLflow's four take as many times as long to start
    os.execv(sys.executable, [sys.executable, "-m", *command])


if __name__ == "__main__":
    run(main, checked=False)
