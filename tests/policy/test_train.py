"""Training: the published schedule, per-agent clipping, learning, and resuming to the same bytes."""

import math
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.policy import agents, train
from pipeline.policy.agents import AgentParams, Policy, PolicyShape, load_policy
from pipeline.policy.estimators import exact as pairs
from pipeline.policy.estimators.base import Estimator
from pipeline.policy.estimators.exact import Exact
from pipeline.policy.estimators.rloo import Rloo
from pipeline.policy.estimators.soft_rank import SoftRank
from pipeline.policy.train import TrainParams, clip_gradients, describe, learning_rate, train_policy, validation_cost
from pipeline.traces.capture import LayerTrace
from pipeline.traces.shards import TraceReader, TraceShape, write_manifest, write_shard

SHAPE = TraceShape("tiny", "ruler", layers=2, kv_heads=2, head_dim=4, block_size=8)
PARAMS = TrainParams(
    agent=AgentParams(hidden_width=16, hidden_layers=2, inputs=("key", "value", "position")),
    steps=150,
    learning_rate=1e-2,
    final_learning_rate=1e-4,
    warmup_steps=5,
    warmup_factor=0.01,
    gradient_clip=5.0,
    weight_decay=0.01,
    validate_every=20,
    checkpoint_every=10,
    seed=3,
)


EXACT, RLOO = Exact(), Rloo(samples=8)
ESTIMATORS: list[Estimator] = [EXACT, RLOO, SoftRank()]


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Traces whose importance is a function of the first key channel, so that it can be learnt."""
    root = tmp_path / "traces"
    generator = torch.Generator().manual_seed(0)

    def sequence(tokens: int) -> list[LayerTrace]:
        layers = []
        for _ in range(SHAPE.layers):
            keys = torch.randn(2, tokens, 4, generator=generator)
            blocks = -(-tokens // SHAPE.block_size)
            record = torch.exp(2 * keys[..., :1]).expand(2, tokens, blocks)
            layers.append(LayerTrace(keys, torch.randn(2, tokens, 4, generator=generator), record))
        return layers

    write_shard(root, "train", 0, SHAPE, [(index, f"t{index}", sequence(40 + index)) for index in range(6)])
    write_shard(root, "validation", 0, SHAPE, [(index, f"v{index}", sequence(50)) for index in range(3)])
    write_manifest(root, SHAPE, {"train": 1, "validation": 1})
    return root


def run(traces: Path, work: Path, estimator: Estimator, params: TrainParams = PARAMS, stop_after: int = 0) -> int:
    """Train; returns the steps taken in this call. ``stop_after`` interrupts like Ctrl-C."""
    work.mkdir(exist_ok=True)
    reader, validation = TraceReader(traces, "train", 1 << 20), TraceReader(traces, "validation", 1 << 20)
    taken = [-1]  # the first call reports the steps found done

    def advance(count: int, status: str) -> None:
        taken[0] += 1
        if stop_after and taken[0] == stop_after:
            raise KeyboardInterrupt

    train_policy(work, reader, validation, estimator, params, describe(params, reader, estimator), "cpu", advance)
    return taken[0]


Sums = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def test_learning_rate_is_the_published_schedule() -> None:
    params = PARAMS.model_copy(
        update={"learning_rate": 5e-5, "final_learning_rate": 1e-6, "warmup_steps": 100, "steps": 4000}
    )
    assert learning_rate(0, params) == pytest.approx(5e-7)
    assert learning_rate(50, params) == pytest.approx(5e-5 * (0.01 + 0.99 * 0.5))
    assert learning_rate(100, params) == pytest.approx(5e-5)
    assert learning_rate(2050, params) == pytest.approx((5e-5 + 1e-6) / 2)
    assert learning_rate(4000, params) == pytest.approx(1e-6)


def test_gradients_are_clipped_per_agent() -> None:
    policy = Policy(PolicyShape(2, 2, 4, PARAMS.agent), torch.Generator().manual_seed(0))
    scale = torch.tensor([0.01, 1.0, 100.0, 0.0])
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter) * scale[:, None, None]
    size = math.sqrt(policy.shape.parameters_per_agent)
    norms = clip_gradients(policy, 5.0)
    torch.testing.assert_close(norms, scale * size)
    for head, factor in enumerate(scale.tolist()):
        clipped = math.sqrt(sum(float(p.grad[head].square().sum()) for p in policy.parameters() if p.grad is not None))
        assert clipped == pytest.approx(min(5.0, factor * size), rel=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: estimator.name)
def test_training_lowers_the_held_out_cost(traces: Path, tmp_path: Path, estimator: Estimator) -> None:
    run(traces, tmp_path / "work", estimator)
    curves = pl.read_parquet(tmp_path / "work" / "curves.parquet").filter(pl.col("metric") == "validation_cost")
    cost = curves.group_by("step").agg(pl.col("value").mean()).sort("step")["value"].to_list()
    # Random ranking against the best order of log-normal importances: far above 1 before, near 1 after.
    assert cost[0] > 1.3
    assert cost[-1] < 1.1
    policy, _ = load_policy(tmp_path / "work", "tiny")
    final = validation_cost(policy, TraceReader(traces, "validation", 0), "cpu")
    last = curves.filter(pl.col("step") == PARAMS.steps - 1).sort("layer", "kv_head")["value"].to_list()
    assert final.tolist() == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: estimator.name)
def test_an_interrupted_training_resumes_and_ends_with_the_same_bytes(
    traces: Path, tmp_path: Path, estimator: Estimator
) -> None:
    run(traces, tmp_path / "whole", estimator)
    with pytest.raises(KeyboardInterrupt):
        run(traces, tmp_path / "resumed", estimator, stop_after=37)
    assert not (tmp_path / "resumed" / "policy.safetensors").exists()
    assert run(traces, tmp_path / "resumed", estimator) == PARAMS.steps - 30  # lost: steps 30 to 36
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "resumed").iterdir())
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), name


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: estimator.name)
def test_gradients_do_not_depend_on_how_heads_are_split(estimator: Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(PolicyShape(2, 2, 4, PARAMS.agent), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 4, 30, 4, generator=generator)
    importance = torch.rand(4, 30, generator=generator)
    uniform = train.draw_uniform(estimator, PARAMS, 0, 4, 30)

    def loss_of(scores: Tensor, heads: slice) -> Tensor:
        return estimator.loss(scores, importance[heads], uniform[:, heads])

    whole = loss_of(policy(keys, values), slice(None))
    expected = torch.autograd.grad(whole.sum(), list(policy.parameters()))
    for heads in (1, 3, 4):
        monkeypatch.setattr(agents, "UNITS_PER_BLOCK", {"cpu": heads * 30 * PARAMS.agent.hidden_width})
        assert len(policy.blocks(30)) == -(-4 // heads)
        loss = train.compute_gradients(policy, keys, values, loss_of)
        torch.testing.assert_close(loss, whole.detach())
        torch.testing.assert_close([parameter.grad for parameter in policy.parameters()], list(expected))


def test_the_grid_changes_no_result_of_a_training(
    traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[str] = []

    def use(way: str, sums: Sums) -> list[float]:
        """Held-out costs of a training whose pairs are all added up by ``sums``."""
        other = {"grid_sums": "direct_sums", "direct_sums": "grid_sums"}[way]
        monkeypatch.setattr(pairs, "NODES_PER_TOKEN", 1000 if way == "grid_sums" else 0)
        monkeypatch.setattr(pairs, way, sums)
        monkeypatch.setattr(pairs, other, None)
        work = tmp_path / str(len(ways))
        ways.append(way)
        run(traces, work, EXACT)
        costs = pl.read_parquet(work / "curves.parquet").filter(pl.col("metric") == "validation_cost")
        return costs.sort("step", "layer", "kv_head")["value"].to_list()

    def in_float64(scores: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        cost, gradient = direct_sums(scores.double(), importance.double())
        return cost.float(), gradient.float()

    grid_sums, direct_sums = pairs.grid_sums, pairs.direct_sums
    grid, direct, unrounded = (
        use("grid_sums", grid_sums),
        use("direct_sums", direct_sums),
        use("direct_sums", in_float64),
    )
    assert unrounded[0] > 3
    # A cost belongs to a ranking: it changes only where two tokens swap, and rounding swaps those whose scores differ
    # by 1e-6 or so. Neither way of adding up float32 scores is further from sums without rounding than that.
    assert grid == pytest.approx(unrounded, rel=1e-4)
    assert direct == pytest.approx(unrounded, rel=1e-4)


def test_seeds_make_a_difference(traces: Path, tmp_path: Path) -> None:
    run(traces, tmp_path / "a", EXACT)
    run(traces, tmp_path / "b", EXACT, PARAMS.model_copy(update={"seed": 4}))
    assert (tmp_path / "a" / "policy.safetensors").read_bytes() != (tmp_path / "b" / "policy.safetensors").read_bytes()


def test_a_damaged_checkpoint_is_named(traces: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(traces, tmp_path / "work", EXACT, stop_after=25)
    checkpoint = tmp_path / "work" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(PipelineError, match=r"checkpoint\.safetensors is damaged .*delete it"):
        run(traces, tmp_path / "work", EXACT)


def test_sequences_shorter_than_a_block_are_refused(tmp_path: Path) -> None:
    short = [LayerTrace(torch.randn(2, 8, 4), torch.randn(2, 8, 4), torch.rand(2, 8, 1)) for _ in range(2)]
    for split in ("train", "validation"):
        write_shard(tmp_path / "traces", split, 0, SHAPE, [(0, "short", short)])
    write_manifest(tmp_path / "traces", SHAPE, {"train": 1, "validation": 1})
    with pytest.raises(PipelineError, match=r"sample short has 8 tokens, not more than traces\.block_size = 8"):
        run(tmp_path / "traces", tmp_path / "work", EXACT)


@pytest.mark.parametrize(
    ("inputs", "seen"),
    [(("key",), slice(0, 4)), (("value", "age"), slice(4, 8)), (("key", "position", "value"), slice(0, 8))],
)
def test_normalisation_statistics_are_those_of_the_training_data(
    traces: Path, tmp_path: Path, inputs: tuple[str, ...], seen: slice
) -> None:
    agent = PARAMS.agent.model_copy(update={"inputs": inputs})
    run(traces, tmp_path / "work", EXACT, PARAMS.model_copy(update={"steps": 1, "agent": agent}))
    policy, _ = load_policy(tmp_path / "work")
    reader = TraceReader(traces, "train", 0)
    states = torch.cat([torch.cat(reader.read(index)[:2], -1) for index in range(6)], dim=1).double()
    states = states[..., seen]
    torch.testing.assert_close(policy.mean[:, 0].double(), states.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(policy.std[:, 0].double(), states.std(1, correction=0), rtol=1e-4, atol=1e-5)


def test_normalisation_sees_all_tasks_where_samples_are_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sequence(task: int) -> list[LayerTrace]:
        states = torch.full((2, 40, 4), float(task))
        return [LayerTrace(states, states, torch.rand(2, 40, 5)) for _ in range(SHAPE.layers)]

    tasks = [task for task in range(5) for _ in range(7)]  # sorted, as samples are
    root = tmp_path / "traces"
    write_shard(root, "train", 0, SHAPE, [(index, f"t{index}", sequence(task)) for index, task in enumerate(tasks)])
    write_shard(root, "validation", 0, SHAPE, [(0, "v0", sequence(0))])
    write_manifest(root, SHAPE, {"train": 1, "validation": 1})
    monkeypatch.setattr(train, "NORMALISATION_SEQUENCES", 5)
    run(root, tmp_path / "work", EXACT, PARAMS.model_copy(update={"steps": 1}))
    policy, _ = load_policy(tmp_path / "work")
    torch.testing.assert_close(policy.mean, torch.full_like(policy.mean, 2.0))  # one sequence of each task
    torch.testing.assert_close(policy.std, torch.full_like(policy.std, math.sqrt(2)))


def test_the_device_draws_nothing() -> None:
    uniform = train.draw_uniform(RLOO, PARAMS, 7, 4, 30)
    assert uniform.device.type == "cpu"
    assert uniform.shape == (RLOO.samples, 4, 30)
    torch.testing.assert_close(uniform, train.draw_uniform(RLOO, PARAMS, 7, 4, 30), rtol=0, atol=0)
    assert not torch.equal(uniform, train.draw_uniform(RLOO, PARAMS, 8, 4, 30))
    assert train.draw_uniform(EXACT, PARAMS, 7, 4, 30).numel() == 0
    # There is no generator for this device: a draw on it would raise.
    scores, importance = (torch.rand(4, 30, device="meta") for _ in range(2))
    loss = RLOO.loss(scores, importance, uniform.to("meta"))
    assert (loss.device.type, loss.shape) == ("meta", (4,))


@pytest.mark.parametrize("estimator", ESTIMATORS[:2], ids=lambda estimator: estimator.name)
def test_a_training_that_diverges_stops_with_one_sentence(traces: Path, tmp_path: Path, estimator: Estimator) -> None:
    params = PARAMS.model_copy(update={"learning_rate": 1e30, "warmup_steps": 0})
    message = rf"^The training with {estimator.name} has diverged: at step \d+ .* of \d of 4 heads are not finite; "
    with pytest.raises(PipelineError, match=message + r"lower train\.learning_rate \(1e\+30\) in params\.yaml\.$"):
        run(traces, tmp_path / "work", estimator, params)
    assert not [path for path in (tmp_path / "work").iterdir() if path.name != "checkpoint.safetensors"]


def test_a_head_with_undefined_scores_costs_nan(traces: Path) -> None:
    policy = Policy(PolicyShape(2, 2, 4, PARAMS.agent), torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.weights[-1][1] = torch.inf
    cost = validation_cost(policy, TraceReader(traces, "validation", 0), "cpu")
    assert cost.isfinite().tolist() == [True, False, True, True]
