"""Training: the published schedule, per-agent clipping, learning, and resuming to the same bytes."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.policy import agents, train
from pipeline.policy.agents import AgentParams, Policy, PolicyShape, load_policy
from pipeline.policy.batches import Batch, draw_examples, make_batch
from pipeline.policy.estimators import exact as pairs
from pipeline.policy.estimators.base import Estimator, Target
from pipeline.policy.estimators.exact import Exact
from pipeline.policy.estimators.rloo import Rloo
from pipeline.policy.estimators.soft_rank import SoftRank
from pipeline.policy.inputs.base import CachedTokens
from pipeline.policy.progress import Curves
from pipeline.policy.train import TrainParams, clip_gradients, describe, learning_rate, train_policy, validation_cost
from pipeline.traces.draws import generator as draws_of
from pipeline.traces.example import best_cost
from pipeline.traces.shards import ExampleReader, TraceShape
from tests.traces.synthetic import Cache, write_traces

SHAPE = TraceShape("tiny", "ruler", (0, 1), kv_heads=2, head_dim=4)
PARAMS = TrainParams(
    agent=AgentParams(hidden_width=16, hidden_layers=2, inputs=("key", "value", "position")),
    steps=150,
    batch_size=2,
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


def learnable(tokens: int, generator: torch.Generator) -> Cache:
    """Importance is a function of the first key channel."""
    keys, values = torch.randn(2, 2, 2, tokens, 4, generator=generator)
    return keys, values, torch.exp(2 * keys[..., 0])


@pytest.fixture(params=[None, 20], ids=["all tokens", "some tokens"])
def traces(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    generator, root = torch.Generator().manual_seed(0), tmp_path / "traces"
    train = [[learnable(size + index, generator) for size in (40, 25)] for index in range(6)]
    validation = [[learnable(50, generator)] for _ in range(3)]
    write_traces(root / "all", SHAPE, {"train": train, "validation": validation})
    write_traces(root / "some", SHAPE, {"train": train}, request.param)
    # Of a validation example all tokens are kept.
    shutil.copytree(root / "all/validation", root / "some/validation")
    manifests = [json.loads((root / name / "manifest.json").read_text()) for name in ("all", "some")]
    manifests[1]["splits"]["validation"] = manifests[0]["splits"]["validation"]
    (root / "some/manifest.json").write_text(json.dumps(manifests[1]))
    return root / "some"


def run(traces: Path, work: Path, estimator: Estimator, params: TrainParams = PARAMS, stop_after: int = 0) -> int:
    """Train; returns the steps taken in this call. ``stop_after`` interrupts like Ctrl-C."""
    work.mkdir(exist_ok=True)
    reader, validation = ExampleReader(traces, "train", 1 << 20), ExampleReader(traces, "validation", 1 << 20)
    taken = [-1]  # the first call reports the steps found done

    def advance(count: int, status: str) -> None:
        taken[0] += 1
        if stop_after and taken[0] == stop_after:
            raise KeyboardInterrupt

    train_policy(work, reader, validation, estimator, params, describe(params, reader, estimator), "cpu", advance)
    return taken[0]


Sums = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def test_learning_rate_is_the_published_schedule() -> None:
    params = PARAMS.model_copy(
        update={"learning_rate": 5e-5, "final_learning_rate": 1e-6, "warmup_steps": 100, "steps": 4000}
    )
    assert learning_rate(0, params) == pytest.approx(5e-7)
    assert learning_rate(50, params) == pytest.approx(5e-5 * (0.01 + 0.99 * 0.5))
    assert learning_rate(100, params) == pytest.approx(5e-5)
    assert learning_rate(2050, params) == pytest.approx((5e-5 + 1e-6) / 2)
    assert learning_rate(4000, params) == pytest.approx(1e-6)


def gradients_of(policy: Policy) -> list[torch.Tensor]:
    return [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]


def test_gradients_are_clipped_per_agent() -> None:
    policy = Policy(PolicyShape(2, 2, 4, PARAMS.agent), torch.Generator().manual_seed(0))
    scale = torch.tensor([0.01, 1.0, 100.0, 0.0])
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter) * scale[:, None, None]
    size = math.sqrt(policy.shape.parameters_per_agent)
    norms = clip_gradients(gradients_of(policy), 5.0)
    torch.testing.assert_close(norms, scale * size)
    for head, factor in enumerate(scale.tolist()):
        clipped = math.sqrt(sum(float(gradient[head].square().sum()) for gradient in gradients_of(policy)))
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
    final = validation_cost(policy, ExampleReader(traces, "validation", 0), "cpu")
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


@pytest.mark.parametrize("estimator", [EXACT, RLOO], ids=lambda estimator: estimator.name)
def test_a_step_never_looks_at_what_an_accelerator_computes(
    estimator: Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device meta, which has shapes and no numbers: whoever asks for one would wait for a GPU there."""
    monkeypatch.setattr(pairs, "DIRECT_UP_TO", {"meta": pairs.DIRECT_UP_TO["cuda"]})
    policy = Policy(PolicyShape(2, 2, 4, PARAMS.agent)).to("meta")
    states = torch.empty(4, 60, 4, dtype=torch.float16, device="meta")
    numbers = torch.empty(4, 60, dtype=torch.int32, device="meta")
    known = torch.empty(4, 2, 30, device="meta")
    batch = Batch(
        CachedTokens(states, states, numbers, numbers),
        numbers.long(),
        Target(known, known, known[..., 0]),
        torch.empty(estimator.rankings, 4, 2, 30, device="meta"),
    )
    optimizer, curves = torch.optim.AdamW(policy.parameters()), Curves(policy.shape, SHAPE.layer_numbers)
    for step in range(2):
        loss, norms = train.compute_gradients(policy, batch, estimator, 5.0)
        curves.add(step, "loss", loss)
        curves.add(step, "gradient_norm", norms)
        optimizer.step()
    with pytest.raises(NotImplementedError, match="meta tensor"):  # as soon as one is asked for
        curves.table()


def make_examples(traces: Path, estimator: Estimator, count: int) -> Batch:
    reader = ExampleReader(traces, "train", 0)
    return make_batch([reader.read(index) for index in range(count)], estimator.rankings, draws_of(0), "cpu")


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: estimator.name)
def test_gradients_do_not_depend_on_how_heads_are_split(
    traces: Path, estimator: Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy(PolicyShape(2, 2, 4, PARAMS.agent), torch.Generator().manual_seed(0))
    batch = make_examples(traces, estimator, 3)
    tokens = batch.tokens.keys.shape[1]
    weights, biases = list(policy.weights), list(policy.biases)
    scores = agents.run_agents(weights, biases, policy.inputs(batch.tokens, slice(None)))
    whole = estimator.loss(batch.placed(scores, slice(None)), batch.target, batch.uniform).mean(-1)
    expected = torch.autograd.grad(whole.sum(), list(policy.parameters()))
    for heads in (1, 3, 4):
        monkeypatch.setattr(agents, "UNITS_PER_BLOCK", {"cpu": heads * tokens * PARAMS.agent.hidden_width})
        assert len(policy.blocks(tokens)) == -(-4 // heads)
        loss, _ = train.compute_gradients(policy, batch, estimator)
        torch.testing.assert_close(loss, whole.detach())
        torch.testing.assert_close([parameter.grad for parameter in policy.parameters()], list(expected))


def test_a_step_over_several_examples_is_the_mean_of_steps_over_each(traces: Path) -> None:
    policy = Policy(PolicyShape(2, 2, 4, PARAMS.agent), torch.Generator().manual_seed(0))
    reader = ExampleReader(traces, "train", 0)
    losses, gradients = [], []
    for index in range(3):
        alone = make_batch([reader.read(index)], 0, draws_of(0), "cpu")
        losses.append(train.compute_gradients(policy, alone, EXACT)[0])
        gradients.append([gradient.clone() for gradient in gradients_of(policy)])
    together, _ = train.compute_gradients(policy, make_examples(traces, EXACT, 3), EXACT)
    torch.testing.assert_close(together, torch.stack(losses).mean(0))
    for parameter, *parts in zip(policy.parameters(), *gradients, strict=True):
        torch.testing.assert_close(parameter.grad, torch.stack(parts).mean(0))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: estimator.name)
def test_nothing_is_learned_where_no_token_is_known(traces: Path, estimator: Estimator) -> None:
    example = ExampleReader(traces, "train", 0).read(0)
    nothing = {name: states[:, :0] for name, states in vars(example).items() if name not in ("cache_size", "best_cost")}
    policy = Policy(PolicyShape(2, 2, 4, PARAMS.agent), torch.Generator().manual_seed(0))
    batch = make_batch([dataclasses.replace(example, **nothing)], estimator.rankings, draws_of(0), "cpu")
    losses, norms = train.compute_gradients(policy, batch, estimator)
    assert not losses.any()
    assert not norms.any()
    assert not any(gradient.any() for gradient in gradients_of(policy))


def test_full_traces_train_like_an_independent_loop_over_all_tokens(traces: Path, tmp_path: Path) -> None:
    """In float64 from the definition: no batches, no grid, no counts, one agent after the other."""
    if (ExampleReader(traces, "train", 0).read(0).count != 1).any():
        pytest.skip("all tokens are kept in the other variant of these traces")
    params = PARAMS.model_copy(update={"steps": 20, "batch_size": 3})
    run(traces, tmp_path / "work", EXACT, params)
    trained, _ = load_policy(tmp_path / "work")
    reader = ExampleReader(traces, "train", 0)
    start = Policy(trained.shape, draws_of(params.seed, "weights", 0))
    start.mean.copy_(trained.mean)
    start.std.copy_(trained.std)
    agent = start.double()
    optimizer = torch.optim.AdamW(agent.parameters(), lr=1, weight_decay=params.weight_decay)
    for step in range(params.steps):
        optimizer.zero_grad()
        for index in draw_examples(len(reader.examples), 3, params.seed, step):
            example = reader.read(index)
            states = torch.cat([example.keys, example.values], -1).double()
            position = torch.arange(example.cache_size).float().log1p() / 8
            for head in range(4):
                seen = (states[head] - agent.mean[head]) / agent.std[head]
                hidden = torch.cat([seen, position.double()[:, None]], -1)
                for layer, (weight, bias) in enumerate(zip(agent.weights, agent.biases, strict=True)):
                    hidden = hidden @ weight[head] + bias[head]
                    hidden = hidden.relu() if layer < 2 else hidden
                before = torch.sigmoid(hidden - hidden.T)
                others = before.sum(0) - 0.5
                importance = example.importance[head].double()
                best = (importance.sort(descending=True).values * torch.arange(example.cache_size)).sum()
                ((others * importance).sum() / best / 3).backward()
        clip_gradients(gradients_of(agent), params.gradient_clip)
        optimizer.param_groups[0]["lr"] = learning_rate(step, params)
        optimizer.step()
    # Costs do not change with the last bias: its gradient is rounding, which AdamW brings to the size of all others.
    for (name, ours), theirs in zip(trained.state_dict().items(), agent.state_dict().values(), strict=True):
        if name != "biases.2":
            assert (ours - theirs).abs().max() < 2e-4 * theirs.abs().max(), name


def test_full_traces_train_to_the_bytes_of_a_loop_over_caches(tmp_path: Path) -> None:
    """Neither files, nor probabilities, nor batches: the caches themselves, all tokens of one in each step."""
    generator = torch.Generator().manual_seed(0)
    caches = [learnable(25 + index, generator) for index in range(6)]
    write_traces(tmp_path, SHAPE, {"train": [[cache] for cache in caches], "validation": [[caches[0]]]})
    params = PARAMS.model_copy(update={"batch_size": 1, "steps": 20})
    run(tmp_path, tmp_path / "work", EXACT, params)
    trained, _ = load_policy(tmp_path / "work")
    policy = Policy(trained.shape, draws_of(params.seed, "weights", 0))
    policy.mean.copy_(trained.mean)
    policy.std.copy_(trained.std)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1, weight_decay=params.weight_decay, fused=True)
    for step in range(params.steps):
        (drawn,) = draw_examples(6, 1, params.seed, step)
        keys, values, importance = (states.flatten(0, 1) for states in caches[drawn])
        with torch.enable_grad():
            scores = agents.run_agents(
                list(policy.weights),
                list(policy.biases),
                policy.inputs(CachedTokens.whole(keys.half(), values.half()), slice(None)),
            )
            best = best_cost(importance.double()).float()
            loss = pairs.expected_cost(scores, importance, torch.ones_like(importance)) / best
        for parameter, gradient in zip(
            policy.parameters(), torch.autograd.grad(loss.sum(), list(policy.parameters())), strict=True
        ):
            parameter.grad = gradient
        clip_gradients(gradients_of(policy), params.gradient_clip)
        optimizer.param_groups[0]["lr"] = learning_rate(step, params)
        optimizer.step()
    for (name, ours), theirs in zip(trained.state_dict().items(), policy.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


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

    def in_float64(scores: Tensor, importance: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        cost, gradient = direct_sums(scores.double(), importance.double(), count.double())
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
    reader = ExampleReader(traces, "train", 0)
    examples = [reader.read(index) for index in range(12)]
    states = torch.cat([torch.cat([found.keys, found.values], -1) for found in examples], dim=1).double()[..., seen]
    count = torch.cat([found.count for found in examples], dim=1).double()[..., None]
    mean = (count * states).sum(1, keepdim=True) / count.sum(1, keepdim=True)
    variance = (count * (states - mean).square()).sum(1, keepdim=True) / count.sum(1, keepdim=True)
    torch.testing.assert_close(policy.mean.double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(policy.std.double(), variance.sqrt(), rtol=1e-4, atol=1e-5)


def test_normalisation_sees_all_tasks_where_samples_are_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cache(task: int) -> Cache:
        states = torch.full((2, 2, 40, 4), float(task))
        return states, states, torch.rand(2, 2, 40)

    tasks = [task for task in range(5) for _ in range(7)]  # sorted, as samples are
    root = tmp_path / "traces"
    write_traces(root, SHAPE, {"train": [[cache(task)] for task in tasks], "validation": [[cache(0)]]})
    monkeypatch.setattr(train, "NORMALISATION_EXAMPLES", 5)
    run(root, tmp_path / "work", EXACT, PARAMS.model_copy(update={"steps": 1}))
    policy, _ = load_policy(tmp_path / "work")
    torch.testing.assert_close(policy.mean, torch.full_like(policy.mean, 2.0))  # one sequence of each task
    torch.testing.assert_close(policy.std, torch.full_like(policy.std, math.sqrt(2)))


def test_the_device_draws_nothing(traces: Path) -> None:
    example = ExampleReader(traces, "train", 0).read(0)
    batch, again, other = (make_batch([example], 8, draws_of(3, "rankings", step), "cpu") for step in (7, 7, 8))
    assert batch.uniform.shape == (8, *batch.target.count.shape)
    assert torch.equal(batch.uniform, again.uniform)
    assert not torch.equal(batch.uniform, other.uniform)
    # There is no generator for this device: a draw on it would raise.
    target = Target(*(states.to("meta") for states in vars(batch.target).values()))
    loss = RLOO.loss(torch.rand(target.count.shape, device="meta"), target, batch.uniform.to("meta"))
    assert (loss.device.type, loss.shape) == ("meta", (4, 1))


def test_examples_are_drawn_uniformly_by_seed_and_step() -> None:
    found = torch.tensor([draw_examples(10, 4, 0, step) for step in range(2000)])
    assert ((found.flatten().bincount(minlength=10) - 800).abs() < 5 * 800**0.5).all()
    assert draw_examples(10, 4, 0, 7) == found[7].tolist() != draw_examples(10, 4, 1, 7)


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
    cost = validation_cost(policy, ExampleReader(traces, "validation", 0), "cpu")
    assert cost.isfinite().tolist() == [True, False, True, True]


def test_curves_taken_up_again_lie_beside_those_of_another_device() -> None:
    curves = Curves(PolicyShape(2, 2, 4, PARAMS.agent), (0, 1))
    curves.points.append((0, "loss", torch.arange(4.0)))  # as a checkpoint gives them
    curves.add(1, "loss", torch.zeros(4, device="meta"))
    # Nothing can be fetched from this device; what there is on the CPU is not put together with it.
    with pytest.raises(NotImplementedError, match="meta"):
        _ = curves.points
    assert curves._points[0][2].tolist() == [0, 1, 2, 3]


def test_a_head_of_which_no_token_is_known_learns_nothing_and_is_finite(tmp_path: Path) -> None:
    keys, values, importance = learnable(30, torch.Generator().manual_seed(0))
    splits = {"train": [[(keys, values, importance)]], "validation": [[(keys, values, importance)]]}
    write_traces(tmp_path, SHAPE, splits, tokens=None)
    reader = ExampleReader(tmp_path, "train", 0)
    example = reader.read(0)
    nothing = dataclasses.replace(example, count=example.count * torch.tensor([[1.0], [0.0], [1.0], [1.0]]))
    reader._memory[0], reader._cache_bytes = nothing, 1 << 30
    policy = Policy(PolicyShape(2, 2, 4, PARAMS.agent), torch.Generator().manual_seed(0))
    train._normalise(policy, reader)
    assert policy.mean.isfinite().all()
    assert policy.std.isfinite().all()
