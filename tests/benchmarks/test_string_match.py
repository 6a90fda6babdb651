"""Our per-sample metrics against the functions in NVIDIA's wheel."""

import runpy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.benchmarks.string_match import metric_for, string_match_all, string_match_part
from pipeline.errors import PipelineError
from pipeline.params import RULER_TASKS, load_params
from pipeline.sources import fetch

REPOSITORY = Path(__file__).parents[2]
# Few letters, so that references do occur; ß and İ change length when lowered.
TEXT = st.text("aAbB ßİ7", max_size=12)


@pytest.fixture(scope="module")
def official() -> dict:
    source = load_params(REPOSITORY / "profiles/default.yaml").corpora["ruler"].source
    wheel = fetch(source, REPOSITORY / ".cache/sources")
    return runpy.run_path(str(wheel / "long_context_eval/eval/synthetic/constants.py"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(prediction=TEXT, references=st.lists(TEXT, min_size=1, max_size=5))
def test_metrics_equal_the_official_ones(official: dict, prediction: str, references: list[str]) -> None:
    for ours, name in ((string_match_all, "string_match_all"), (string_match_part, "string_match_part")):
        theirs = official[f"{name}_per_sample"]([prediction], [references])[0]
        assert 100 * ours(prediction, references) == pytest.approx(theirs, abs=1e-9)
        assert round(100 * ours(prediction, references), 2) == official[name]([prediction], [references])


def test_every_task_has_the_official_metric(official: dict, ruler_scripts: dict[str, str]) -> None:
    for task in RULER_TASKS:
        assert metric_for(task).__name__ == official["TASKS"][ruler_scripts[task]]["metric_fn"].__name__


@pytest.fixture(scope="module")
def ruler_scripts() -> dict[str, str]:
    from pipeline.corpora.ruler import read_tasks

    source = load_params(REPOSITORY / "profiles/default.yaml").corpora["ruler"].source
    return {name: task.script for name, task in read_tasks(fetch(source, REPOSITORY / ".cache/sources")).items()}


def test_unknown_task_and_missing_references_are_refused() -> None:
    with pytest.raises(PipelineError, match="no RULER task"):
        metric_for("qa_3")
    for metric in (string_match_all, string_match_part):
        with pytest.raises(PipelineError, match="no answers"):
            metric("text", [])
