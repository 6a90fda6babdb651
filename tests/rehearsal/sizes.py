"""What a rehearsal replaces of a profile: sizes, and nothing else."""

from fnmatch import fnmatchcase
from typing import Any

from tests.rehearsal.models import LAYERS

# Where a value stands -> the most that it may be; of a list, that or the elements that stay.
SIZES: dict[str, int | frozenset[str]] = {
    "benchmarks.*.samples.sizes.train": 2,
    "benchmarks.*.samples.sizes.validation": 1,
    "benchmarks.*.samples.sizes.test": 1,
    "benchmarks.*.samples.length": 1280,
    "benchmarks.*.samples.max_new_tokens": 4,
    # The first two are shown as texts. The needles' pairs of words take long to make, so that they are made once.
    "benchmarks.ruler.samples.tasks": frozenset({"niah_multikey_1", "vt", "fwe"}),
    "benchmarks.ruler-*.samples.tasks": frozenset({"vt", "fwe"}),
    "benchmarks.*.evaluate.budgets": 256,
    "evaluation.budgets": 256,
    "train.agent.hidden_width": 16,
    "train.steps": 4,
    "train.warmup_steps": 2,
    "train.validate_every": 2,
    "train.checkpoint_every": 2,
    "estimators.rloo.samples": 2,
    "train.batch_size": 2,
    "report.bootstrap_samples": 50,
    "report.example_layer": LAYERS - 1,
}


def reduced(params: dict[str, Any]) -> dict[str, Any]:
    """A parsed params.yaml with these sizes. Every line of the table has to replace something."""
    unused = set(SIZES)

    def walk(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {name: walk(value, f"{key}.{name}" if key else name) for name, value in node.items()}
        pattern = next((pattern for pattern in SIZES if fnmatchcase(key, pattern)), None)
        if pattern is None or node is None:
            return node
        most = SIZES[pattern]
        if isinstance(most, frozenset):
            less = tuple(value for value in node if value in most)
        elif isinstance(node, tuple):
            less = tuple(value for value in node if value <= most)
        else:
            less = min(node, most)
        if less != node:
            unused.discard(pattern)
        return less

    result: dict[str, Any] = walk(params, "")
    assert not unused, f"tests/rehearsal/sizes.py names what the profile does not have: {', '.join(sorted(unused))}"
    return result
