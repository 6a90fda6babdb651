"""Where the studies find their parameters and leave their outputs. The only file with the names of their folders."""

from pathlib import Path

PARAMS = Path("studies/params.yaml")
SENSITIVITY = Path("studies/results/sensitivity.parquet")


def traces(model: str = "", trained_on: str = "") -> Path:
    """What the sensitivity study captures besides the pipeline's traces."""
    return Path("studies/traces") / model / trained_on


def report(study: str, model: str = "") -> Path:
    """Figures and pages of a study."""
    return Path("studies/reports") / study / model
