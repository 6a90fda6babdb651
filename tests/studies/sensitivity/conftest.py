"""Traces of two made-up benchmarks whose importance can be learnt, each from another channel of the keys.

The hidden states hold the keys of all heads, so that it can be learnt from them too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipeline.policy.agents import AgentParams
from pipeline.policy.estimators.exact import Exact
from pipeline.policy.estimators.rloo import Rloo
from pipeline.policy.estimators.soft_rank import SoftRank
from pipeline.policy.train import TrainParams
from pipeline.traces.shards import TraceShape
from studies.sensitivity.hidden import write_hidden_manifest, write_hidden_shard
from studies.sensitivity.params import Longer, StudySensitivity
from studies.sensitivity.trace_sets import HIDDEN, LONGER_HIDDEN, LONGER_TRACES, TraceSet
from tests.traces.synthetic import Cache, write_traces

Splits = Mapping[str, Sequence[int]]
LAYERS, KV_HEADS = 4, 2
TRAIN = TrainParams(
    agent=AgentParams(hidden_width=16, hidden_layers=2, inputs=("key", "value", "position")),
    steps=120,
    batch_size=1,
    learning_rate=1e-2,
    final_learning_rate=1e-4,
    warmup_steps=12,
    warmup_factor=0.01,
    gradient_clip=5.0,
    weight_decay=0.01,
    validate_every=40,
    checkpoint_every=10,
    seed=3,
)
ESTIMATORS = {"exact": Exact(), "rloo": Rloo(samples=4), "soft_rank": SoftRank()}
STUDY = StudySensitivity(
    layers=(1, 3),
    seeds=2,
    base_steps=60,
    training_fraction=(0.5, 1.0),
    steps=(30, 60),
    hidden_width=(4, 16),
    inputs=("keys", "values", "both", "hidden"),
    rate_factor=(10.0, 1.0),
    longer={"ruler": Longer(length=1024, samples=1)},
)
SHORT, LONG = {"train": range(40, 46), "validation": (50, 50, 50)}, {"validation": (120, 140)}


def write_set(root: Path, hidden: Path, model: str, benchmark: str, channel: int, splits: Splits) -> None:
    """Traces of all layers and hidden states of the study's; splits: split -> tokens of each sequence."""
    shape = TraceShape(model, benchmark, tuple(range(LAYERS)), KV_HEADS, head_dim=4)
    generator = torch.Generator().manual_seed(channel + len(splits))

    def cache(tokens: int) -> Cache:
        keys, values = torch.randn(2, LAYERS, KV_HEADS, tokens, 4, generator=generator)
        return keys, values, torch.exp(2 * keys[..., channel])

    found = {split: [[cache(tokens)] for tokens in lengths] for split, lengths in splits.items()}
    write_traces(root, shape, found)
    for split, sequences in found.items():
        states = [
            (index, f"{split}{index}", {layer: keys[layer].transpose(0, 1).flatten(1) for layer in STUDY.layers})
            for index, [(keys, _, _)] in enumerate(sequences)
        ]
        write_hidden_shard(hidden, split, 0, STUDY.layers, KV_HEADS * 4, states)
    write_hidden_manifest(hidden, KV_HEADS * 4)


def write_all(traces: Path, extra: Path, model: str) -> None:
    """What the stage traces and the study's would leave, of both benchmarks."""
    for channel, benchmark in enumerate(("ruler", "dialogues")):
        write_set(traces / benchmark, extra / benchmark / HIDDEN, model, benchmark, channel, SHORT)
    write_set(extra / "ruler" / LONGER_TRACES, extra / "ruler" / LONGER_HIDDEN, model, "ruler", 0, LONG)


@dataclass(frozen=True)
class Sets:
    """What the study reads."""

    trained: dict[str, TraceSet]
    longer: dict[str, TraceSet]


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Sets:
    root = tmp_path_factory.mktemp("traces")
    write_all(root / "traces", root / "extra", "tiny")
    trained = {
        benchmark: TraceSet(benchmark, 512, root / "traces" / benchmark, root / "extra" / benchmark / HIDDEN)
        for benchmark in ("ruler", "dialogues")
    }
    extra = root / "extra/ruler"
    return Sets(trained, {"ruler": TraceSet("ruler", 1024, extra / LONGER_TRACES, extra / LONGER_HIDDEN)})
