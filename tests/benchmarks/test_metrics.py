"""Each sample gets the metric that it names."""

import json

import pytest

from pipeline.benchmarks.metrics import scorer
from pipeline.errors import PipelineError
from pipeline.samples.sample import Sample


def sample(task: str, metric: str, answers: tuple[str, ...], **meta: list[str]) -> Sample:
    return Sample("s", "corpus", task, "test", (1, 2), 1, None, answers, 8, json.dumps(meta), metric)


@pytest.mark.parametrize(
    ("task", "metric", "answers", "text", "expected"),
    [
        # All needles count for retrieval, any alias for a question.
        ("niah_multivalue", "string_match", ("12", "34"), "it is 12", 0.5),
        ("qa_1", "string_match", ("12", "34"), "it is 12", 1.0),
        ("qasper", "qa_f1", ("yes", "no"), "No.", 1.0),
        # The first line counts where the task says so.
        ("triviaqa", "qa_f1", ("yes",), "yes\nand more", 1.0),
        ("qasper", "qa_f1", ("yes",), "yes\nand more", 0.5),
        ("passage_retrieval_en", "retrieval", ("Paragraph 3",), "Paragraph 3 or 4", 0.5),
        ("passage_count", "count", ("3",), "3", 1.0),
        ("gov_report", "rouge_l", ("one two",), "one two", 0.999999995),
        ("lcc", "code_similarity", ("x = 1",), "x = 1", 1.0),
    ],
)
def test_metrics_are_the_sample_s(task: str, metric: str, answers: tuple[str, ...], text: str, expected: float) -> None:
    assert scorer(sample(task, metric, answers))(text) == pytest.approx(expected, abs=1e-12)


def test_classes_come_from_the_meta_data() -> None:
    score = scorer(sample("trec", "classification", ("Date",), all_classes=["Date", "City"]))
    assert (score("Date"), score("Date, City"), score("City")) == (1.0, 0.5, 0.0)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(PipelineError, match="'nll' is no metric"):
        scorer(sample("dialogues", "nll", ("a",)))("text")
    with pytest.raises(PipelineError, match="no RULER task"):
        scorer(sample("qa_3", "string_match", ("a",)))
