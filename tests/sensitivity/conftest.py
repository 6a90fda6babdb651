"""Traces of two made-up corpora whose importance can be learnt, each from another channel of the keys."""

from pathlib import Path

import pytest
import torch

from pipeline.params import AgentParams, SensitivityParams, TrainParams
from pipeline.traces.capture import LayerTrace
from pipeline.traces.shards import TraceShape, write_manifest, write_shard

LAYERS, KV_HEADS = 4, 2
TRAIN = TrainParams(
    agent=AgentParams(hidden_width=16, hidden_layers=2, position_features=("position",)),
    steps=120,
    learning_rate=1e-2,
    final_learning_rate=1e-4,
    warmup_steps=12,
    warmup_factor=0.01,
    gradient_clip=5.0,
    weight_decay=0.01,
    rloo_samples=4,
    validate_every=40,
    checkpoint_every=10,
    seed=3,
)
STUDY = SensitivityParams(
    layers=(1, 3),
    seeds=2,
    base_steps=60,
    training_fraction=(0.5, 1.0),
    steps=(30, 60),
    hidden_width=(4, 16),
    inputs=("keys", "values", "both"),
    rate_factor=(10.0, 1.0),
)


def write_traces(root: Path, model: str, corpus: str, channel: int) -> None:
    shape = TraceShape(model, corpus, LAYERS, KV_HEADS, head_dim=4, block_size=8)
    generator = torch.Generator().manual_seed(channel)

    def sequence(tokens: int) -> list[LayerTrace]:
        layers = []
        for _ in range(LAYERS):
            keys, values = torch.randn(2, KV_HEADS, tokens, 4, generator=generator)
            record = torch.exp(2 * keys[..., channel : channel + 1]).expand(KV_HEADS, tokens, -(-tokens // 8))
            layers.append(LayerTrace(keys, values, record))
        return layers

    write_shard(root, "train", 0, shape, [(index, f"t{index}", sequence(40 + index)) for index in range(6)])
    write_shard(root, "validation", 0, shape, [(index, f"v{index}", sequence(50)) for index in range(3)])
    write_manifest(root, shape, {"train": 1, "validation": 1})


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """corpus -> traces."""
    root = tmp_path_factory.mktemp("traces")
    for channel, corpus in enumerate(("ruler", "dialogues")):
        write_traces(root / corpus, "tiny", corpus, channel)
    return {corpus: root / corpus for corpus in ("ruler", "dialogues")}
