"""Command `report`: the study's figures and page."""

from studies import _paths


def report() -> None:
    """Show the study as figures and one self-contained page in studies/reports/sensitivity."""
    from pipeline.closure import Code
    from pipeline.files import write_text
    from pipeline.params import load_params
    from pipeline.reporting.drawing import save
    from pipeline.reporting.read import read_table
    from pipeline.work import publish, work_directory
    from studies.sensitivity import figures, page, tables
    from studies.sensitivity.columns import STUDY_COLUMNS
    from studies.sensitivity.params import read_study, titles

    params = load_params()
    study, confidence = read_study(params), params.report.confidence
    costs = read_table(_paths.SENSITIVITY, STUDY_COLUMNS)
    summary, curves = tables.summary_table(costs, confidence), tables.curve_table(costs, confidence)
    work = work_directory("sensitivity-report", {"confidence": confidence}, [_paths.SENSITIVITY], Code(__file__))
    drawings = figures.drawings(summary, curves, confidence, titles(params))
    drawn = [(drawing, save(drawing, work)) for drawing in drawings]
    write_text(work / "index.html", page.render(params, study, summary, drawn))
    publish(work, _paths.report("sensitivity"))
