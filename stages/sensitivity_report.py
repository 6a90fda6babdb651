"""Stage `sensitivity_report` of studies/dvc.yaml: the study's figures and page, in reports/sensitivity/."""

from pathlib import Path
from typing import Annotated

import typer

from stages._app import run


def report(
    study: Annotated[Path, typer.Option(help="What the sensitivity stage wrote.")] = Path(
        "results/sensitivity.parquet"
    ),
    params_file: Annotated[Path, typer.Option("--params", help="The params file.")] = Path("params.yaml"),
) -> None:
    """Show the sensitivity study as figures and one self-contained page."""
    from pipeline.params import load_params
    from pipeline.reporting.figures import save
    from pipeline.reporting.tables import read_table
    from pipeline.sensitivity import figures, page, tables
    from pipeline.sensitivity.study import STUDY_COLUMNS
    from pipeline.workdir import publish, work_directory, write_text

    params = load_params(params_file)
    costs = read_table(study, STUDY_COLUMNS)
    confidence = params.report.confidence
    summary, curves = tables.summary_table(costs, confidence), tables.curve_table(costs, confidence)
    work = work_directory("sensitivity-report", {"confidence": confidence}, [study])
    drawn = [(drawing, save(drawing, work)) for drawing in figures.drawings(summary, curves, confidence)]
    write_text(work / "index.html", page.render(params, summary, drawn))
    publish(work, Path("reports/sensitivity"))


if __name__ == "__main__":
    run(report)
