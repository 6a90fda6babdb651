"""The metric that a sample names, ready to score a generated text."""

import json
from collections.abc import Callable

from pipeline.benchmarks.longbench import longbench_score
from pipeline.benchmarks.string_match import metric_for
from pipeline.samples.sample import Sample


def scorer(sample: Sample) -> Callable[[str], float]:
    """A function from a generated text to its score, a fraction; higher is better.

    Raises
    ------
    PipelineError
        The sample's task is unknown to its metric, or, on the call, its metric is unknown or lacks what it needs.
    """
    if sample.metric == "string_match":
        metric = metric_for(sample.task)
        return lambda text: metric(text, sample.answers)
    classes = json.loads(sample.meta).get("all_classes")
    return lambda text: longbench_score(sample.task, sample.metric, text, sample.answers, classes)
