"""Where the outputs of the stages lie. The only file with the names of their folders; dvc.yaml is held to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.tables import PolicyKey

WATCH = Path("sources/watch")
RESULTS, METRICS, PLOTS, REPORTS = Path("results"), Path("metrics"), Path("plots"), Path("reports")


def source_state(kind: str = "", name: str = "") -> Path:
    """What a model or a benchmark (``kind``: models, benchmarks) is made from; without names the whole folder."""
    root = Path("sources/state")
    return root / kind / f"{name}.json" if name else root


def model(name: str = "") -> Path:
    """An exported model."""
    return Path("models") / name


def check(model: str = "") -> Path:
    """What the check found of a model."""
    return Path("checks") / (f"{model}.json" if model else "")


def samples(model: str = "", benchmark: str = "", split: str = "") -> Path:
    """Samples of a benchmark, tokenised for a model."""
    return Path("samples") / model / benchmark / (f"{split}.parquet" if split else "")


def traces(model: str = "", trained_on: str = "") -> Path:
    """What policies learn from."""
    return Path("traces") / model / trained_on


def policy(model: str = "", trained_on: str = "", estimator: str = "") -> Path:
    """A trained policy."""
    return Path("policies") / model / trained_on / estimator


def answers(model: str = "", benchmark: str = "") -> Path:
    """What every policy said at every budget, and what its rankings cost."""
    return Path("answers") / model / benchmark


def scores(model: str = "", benchmark: str = "") -> Path:
    """The answers, judged."""
    return Path("scores") / model / (f"{benchmark}.parquet" if benchmark else "")


def texts(model: str = "", benchmark: str = "") -> Path:
    """Texts that are shown token by token, with every policy's order."""
    return Path("texts") / model / benchmark


def policies(model: str, trained_on: tuple[str, ...], estimators: tuple[str, ...]) -> Mapping["PolicyKey", Path]:
    """Every policy of a model that the matrix names: one that was dropped from it may still lie on disk."""
    from pipeline.tables import trained_policy

    return {
        trained_policy(source, estimator): policy(model, source, estimator)
        for source in trained_on
        for estimator in estimators
    }
