"""The paths that run on a GPU, against the CPU and against float64.

Each check runs twice: on the CPU, and on a GPU where there is one. Rounding differs between them, so where a result
is not exact the rule is that of two: the device's error, against float64 on the CPU, may be twice that of the same
work in the same precision as it is commonly done, and a few units of rounding besides.
"""

import copy
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pipeline.benchmarks.base import Answer
from pipeline.evaluation.answers import cost_table
from pipeline.evaluation.ask import Said
from pipeline.evaluation.sweep import Sweep
from pipeline.eviction.budget import EvaluationParams, gather_tokens, kept_tokens, protected_ranking
from pipeline.eviction.rankers import make_rankers
from pipeline.models.layers import full_attention_layers
from pipeline.models.layout import cache_layout
from pipeline.models.load import head_shape
from pipeline.params import Params
from pipeline.policy import agents, train
from pipeline.policy.agents import AgentParams, Policy, PolicyShape
from pipeline.policy.batches import Batch, make_batch
from pipeline.policy.estimators.base import Estimator, Target
from pipeline.policy.estimators.exact import Exact
from pipeline.policy.estimators.rloo import Rloo
from pipeline.policy.estimators.soft_rank import SoftRank
from pipeline.policy.progress import CHECKPOINT_FILE
from pipeline.policy.train import CURVES_FILE, TrainParams, describe, train_policy
from pipeline.samples.sample import Sample
from pipeline.tables import FULL, PolicyKey
from pipeline.traces.build import build_traces
from pipeline.traces.capture import run_captured
from pipeline.traces.draws import generator as draws_of
from pipeline.traces.example import RankingExample
from pipeline.traces.params import TracesParams, training_cuts
from pipeline.traces.shards import ExampleReader, TraceShape
from studies.latency.measure import measure_latency
from tests.conftest import MakeModel
from tests.traces.synthetic import Cache, write_traces

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")],
    ),
]
on_devices = pytest.mark.parametrize("device", DEVICES)
ESTIMATORS = [pytest.param(found, id=found.name) for found in (Exact(), Rloo(samples=8), SoftRank())]

SHAPE = TraceShape("tiny", "corpus", (0, 1), kv_heads=2, head_dim=8)
PARAMS = TrainParams(
    agent=AgentParams(hidden_width=16, hidden_layers=2, inputs=("key", "value", "position", "age")),
    steps=8,
    batch_size=3,
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    warmup_steps=2,
    warmup_factor=0.1,
    gradient_clip=5.0,
    weight_decay=0.01,
    validate_every=4,
    checkpoint_every=3,
    seed=3,
)
TOKENS = 150
IDS = torch.arange(TOKENS + 8) * 37 % 125 + 3


def error(found: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    expected = reference.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm())


def assert_no_worse(found: Tensor, common: Tensor, reference: Tensor, rounding: float = 5e-7) -> None:
    """The rule of two: ``found`` from the device, ``common`` what it is measured by, ``reference`` in float64."""
    ours, theirs = error(found, reference), error(common, reference)
    assert ours <= 2 * theirs + rounding, f"error {ours:.2e}, against {theirs:.2e}"


def random_states(heads: int, tokens: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    first, second = (torch.randn(heads, tokens, SHAPE.head_dim, generator=generator) for _ in range(2))
    return first.to(dtype), second.to(dtype)


def make_policy() -> Policy:
    policy = Policy(PolicyShape(2, 2, SHAPE.head_dim, PARAMS.agent), torch.Generator().manual_seed(0))
    policy.mean.fill_(0.1)
    policy.std.fill_(1.3)
    return policy


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_policy_scores_the_same_cache_alike_in_blocks_and_by_layer(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy()
    states = random_states(4, 200, dtype)
    on_device = [part.to(device) for part in states]
    with torch.no_grad():
        reference, common = copy.deepcopy(policy).double()(*states), policy(*states)
        policy = policy.to(device)
        whole = policy(*on_device)
        by_layer = torch.cat([policy(*(part[2 * i : 2 * i + 2] for part in on_device), layer=i) for i in range(2)])
        monkeypatch.setattr(agents, "UNITS_PER_BLOCK", {"cpu": 1 << 10, "cuda": 1 << 10})
        in_blocks = policy(*on_device)
    for found in (whole, by_layer, in_blocks):
        assert found.device.type == device
        assert found.dtype == torch.float32
        assert_no_worse(found, common, reference)


def example(tokens: int) -> RankingExample:
    """A sample of the tokens of a cache; the heads hold 6 to 9 tenths of so many."""
    keys, values = random_states(4, tokens)
    draws = torch.Generator().manual_seed(1)
    importance = torch.rand(4, tokens, generator=draws) ** 4
    known = torch.arange(tokens) < torch.tensor([[6], [7], [8], [9]]) * tokens // 10
    count = torch.where(known, 1 + 3 * torch.rand(4, tokens, generator=draws), 0)
    positions = torch.arange(tokens, dtype=torch.int32).expand(4, tokens)
    return RankingExample(2 * tokens, keys, values, positions, importance * known, count, importance.sum(-1) * tokens)


def in_precision(batch: Batch, dtype: torch.dtype) -> Batch:
    target = Target(*(states.to(dtype) for states in vars(batch.target).values()))
    return dataclasses.replace(batch, target=target)


@on_devices
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_of_a_step(device: str, estimator: Estimator) -> None:
    def gradients(policy: Policy, to: str, dtype: torch.dtype) -> Tensor:
        batch = make_batch([example(96), example(60)], estimator.rankings, draws_of(0), to)
        train.compute_gradients(policy, in_precision(batch, dtype), estimator, PARAMS.gradient_clip)
        return torch.cat([parameter.grad.flatten().cpu() for parameter in policy.parameters()])

    found = gradients(make_policy().to(device), device, torch.float32)
    common = gradients(make_policy(), "cpu", torch.float32)
    assert_no_worse(found, common, gradients(make_policy().double(), "cpu", torch.float64), rounding=2e-6)


@pytest.fixture(params=[None, 40], ids=["all tokens", "some tokens"])
def traces(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Traces whose importance is a function of the first key channel."""
    root = tmp_path / "traces"

    def cache(tokens: int) -> Cache:
        keys, values = (torch.stack(states.float().chunk(2)) for states in random_states(4, tokens))
        return keys, values, torch.exp(keys[..., 0])

    splits = {
        "train": [[cache(100 + index), cache(70 + index)] for index in range(4)],
        "validation": [[cache(90 + index)] for index in range(2)],
    }
    write_traces(root, SHAPE, splits, request.param)
    return root


def run_training(traces: Path, work: Path, estimator: Estimator, device: str, stop_after: int = 0) -> Tensor:
    """All weights of the trained policy, flat; ``stop_after`` interrupts after so many steps, as Ctrl-C does."""
    work.mkdir(exist_ok=True)
    reader, validation = (ExampleReader(traces, split, 1 << 20) for split in ("train", "validation"))
    calls = 0

    def advance(count: int, status: str) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_after + 1 and stop_after:  # the first call reports the steps found done
            raise KeyboardInterrupt

    config = describe(PARAMS, reader, estimator)
    train_policy(work, reader, validation, estimator, PARAMS, config, device, advance)
    weights = load_file(work / agents.WEIGHTS_FILE)
    return torch.cat([weights[name].flatten().double() for name in sorted(weights) if name not in ("mean", "std")])


def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make training compute in float64, from the same initial weights."""
    make, read = train.Policy, train.read_batches
    monkeypatch.setattr(train, "Policy", lambda *arguments: make(*arguments).double())
    monkeypatch.setattr(
        train,
        "read_batches",
        lambda *arguments: ((step, in_precision(batch, torch.float64)) for step, batch in read(*arguments)),
    )


@on_devices
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_gives_what_the_cpu_gives(
    device: str, estimator: Estimator, traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_training(traces, tmp_path / "found", estimator, device)
    common = run_training(traces, tmp_path / "common", estimator, "cpu")
    with monkeypatch.context() as patched:
        in_float64(patched)
        reference = run_training(traces, tmp_path / "reference", estimator, "cpu")
    # Steps of AdamW have the size of the learning rate whatever the gradient's: rounding grows with every one.
    assert_no_worse(found, common, reference, rounding=2e-5)
    costs = [
        pl.read_parquet(tmp_path / name / CURVES_FILE).filter(pl.col("metric") == "validation_cost")["value"]
        for name in ("found", "reference")
    ]
    assert costs[0].to_list() == pytest.approx(costs[1].to_list(), rel=1e-4)


@on_devices
@pytest.mark.parametrize("estimator", ESTIMATORS[:2])
def test_an_interrupted_training_resumes_on_the_device(
    device: str, estimator: Estimator, traces: Path, tmp_path: Path
) -> None:
    whole = run_training(traces, tmp_path / "whole", estimator, device)
    with pytest.raises(KeyboardInterrupt):
        run_training(traces, tmp_path / "resumed", estimator, device, stop_after=5)
    assert (tmp_path / "resumed" / CHECKPOINT_FILE).exists()
    resumed = run_training(traces, tmp_path / "resumed", estimator, device)
    if device == "cpu":
        assert torch.equal(resumed, whole)
    else:  # sums that meet at a node of the grid are added in any order
        assert error(resumed, whole) < 2e-5


CUTS = (40, 100, 157)


def eager(model: PreTrainedModel, device: str) -> dict[int, list[Tensor]]:
    """Importance by cut and layer, from transformers' own eager attention, which returns all its weights."""
    model.to(device)  # type: ignore[arg-type]  # stubs expect the module's own overload
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(IDS[None].to(device), past_key_values=DynamicCache(), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    kv_heads = model.config.num_key_value_heads
    found: dict[int, list[Tensor]] = {cut: [] for cut in CUTS}
    for number in full_attention_layers(model.config):
        strongest = attentions[number][0].unflatten(0, (kv_heads, -1)).amax(1)  # (kv_heads, queries, tokens)
        for cut in CUTS:
            found[cut].append(strongest[:, cut:, :cut].sum(1, dtype=torch.float64))
    return found


@on_devices
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_capture_in_bfloat16_is_as_good_as_eager_attention(device: str, family: str, make_model: MakeModel) -> None:
    model = copy.deepcopy(make_model(family)).bfloat16()
    reference = eager(copy.deepcopy(model).double(), "cpu")
    common = eager(copy.deepcopy(model), device)
    captured = run_captured(model.to(device), IDS, DynamicCache(), CUTS)  # type: ignore[arg-type]
    for cut in CUTS:
        assert captured[cut].device.type == device
        assert captured[cut].dtype == torch.float32
        for found, other, expected in zip(captured[cut], common[cut], reference[cut], strict=True):
            assert_no_worse(found, other, expected, rounding=1e-3)


@on_devices
@pytest.mark.parametrize("tokens", [None, 30])
def test_traces_made_on_the_device_hold_what_the_model_read(
    device: str, tokens: int | None, make_model: MakeModel, tmp_path: Path
) -> None:
    """Several sequences, written by threads while the next one is read."""
    model = copy.deepcopy(make_model("gemma3")).to(device, torch.bfloat16)  # type: ignore[call-overload]
    params = TracesParams(cuts=2, at_prompt_end=0.5, tokens=tokens, sequences_per_shard=2, seed=0)
    samples = [
        dataclasses.replace(TEXT, sample_id=f"s{index}", input_ids=tuple(((IDS * (index + 1)) % 125 + 3).tolist()))
        for index in range(5)
    ]
    build_traces(tmp_path, model, "tiny", "ruler", {"train": samples}, params, lambda count: None)
    reader = ExampleReader(tmp_path, "train", 0)
    assert len(reader.examples) == 2 * len(samples)
    for index, sample in enumerate(samples):
        cuts, cache = training_cuts(len(sample.input_ids), sample.context_len, sample.sample_id, params), DynamicCache()
        importance = run_captured(model, torch.tensor(sample.input_ids), cache, cuts)
        layers = [cache.layers[number] for number in cache_layout(model).ranked]
        keys, values = (torch.cat([getattr(layer, name)[0] for layer in layers]) for name in ("keys", "values"))
        for place, cut in enumerate(cuts):
            found = reader.read(2 * index + place)
            known, where = found.count > 0, found.positions.long()
            for ours, theirs in ((found.keys, keys), (found.values, values)):
                expected = theirs.half().cpu().gather(1, where[..., None].expand(-1, -1, theirs.shape[-1]))
                assert torch.equal(ours[known], expected[known])
            expected = importance[cut].flatten(0, 1).cpu().gather(1, where)
            torch.testing.assert_close(found.importance[known], expected[known].clamp_min(1e-10))


class Letters:
    """A tokenizer of which the sweep needs one method: token 3 is "d", 4 is "e", and so on, 26 letters."""

    def decode(
        self, tokens: Sequence[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool = False
    ) -> str:
        return "".join(chr(ord("a") + token % 26) for token in tokens)


BUDGETS = (24, 48, TOKENS)
TEXT = Sample(
    sample_id="s",
    benchmark="ruler",
    task="vt",
    split="test",
    input_ids=tuple(IDS.tolist()),
    prompt_len=TOKENS,
    question_start=None,
    answers=("zzz",),
    max_new_tokens=6,
    meta="{}",
    ask=("likelihood", "text"),
)
CHOICE = dataclasses.replace(TEXT, ask=("choice",), answers=("a", "b"), choices=((5, 6), (7,)), gold=1)


def make_sweep(model: PreTrainedModel, params: Params) -> Sweep:
    agent = AgentParams(hidden_width=8, hidden_layers=1, inputs=("key", "value", "age"))
    shape = PolicyShape(*head_shape(model), agent)
    policies = {PolicyKey("kvp-exact", "ruler"): Policy(shape, torch.Generator().manual_seed(0)).to(model.device)}
    evaluation = EvaluationParams(budgets=BUDGETS, n_sink=4, n_recent=16, seed=0)
    return Sweep(model, Letters(), policies, make_rankers(params.baselines), evaluation, BUDGETS)  # type: ignore[arg-type]


def by_row(answers: Sequence[Said], asked: str) -> dict[tuple[PolicyKey, int | None], Said]:
    return {(said.key, said.budget): said for said in answers if said.ask == asked}


@on_devices
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_the_sweep_gives_what_float64_gives(
    device: str, family: str, make_model: MakeModel, default_params: Params
) -> None:
    def run(dtype: torch.dtype, to: str) -> dict[tuple[PolicyKey, int | None], float]:
        model = copy.deepcopy(make_model(family)).to(to, dtype)  # type: ignore[call-overload]
        answers, costs = make_sweep(model, default_params).run(TEXT, seed=1)
        assert len(cost_table("tiny", TEXT, costs, full_attention_layers(model.config)))
        return {row: statistics.fmean(said.nll) for row, said in by_row(answers, "likelihood").items()}

    found, common, reference = run(torch.float32, device), run(torch.float32, "cpu"), run(torch.float64, "cpu")
    assert set(found) == set(reference)
    # A GPU draws other numbers for the random ranking.
    rows = [row for row in reference if row[0].policy != "random"]
    assert_no_worse(*(torch.tensor([values[row] for row in rows]) for values in (found, common, reference)), 1e-5)
    for key in {key for key, budget in found if budget}:
        assert found[key, TOKENS] == found[FULL, None]


@on_devices
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_sweep_in_bfloat16_answers_texts_and_choices(
    device: str, family: str, make_model: MakeModel, default_params: Params
) -> None:
    model = copy.deepcopy(make_model(family)).to(device, torch.bfloat16)  # type: ignore[call-overload]
    sweep = make_sweep(model, default_params)
    for name, sample, metric in (("ruler", TEXT, "string_match"), ("mmlu", CHOICE, "accuracy")):
        answers, _ = sweep.run(sample, seed=1)
        judge = default_params.benchmarks[name].samples.score
        values = {
            row: judge(sample, Answer(said.text, said.nll))[metric]
            for row, said in by_row(answers, sample.ask[-1]).items()
        }
        assert {budget for _, budget in values} == {*BUDGETS, None}
        assert all(0 <= value <= 1 for value in values.values())


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_keys_are_the_keys_of_the_kept_tokens(device: str, dtype: torch.dtype) -> None:
    keys, _ = random_states(3, 64, dtype)
    scores = torch.rand(5, 3, 64, generator=torch.Generator().manual_seed(2)).to(dtype)  # with ties in bfloat16
    rankings: list[Tensor] = []
    for to in ("cpu", device):
        ranking = protected_ranking(scores.to(to), 4, 16)
        rankings.append(ranking.cpu())
        kept = kept_tokens(ranking, 24)
        gathered = gather_tokens(keys.to(to), kept).cpu()
        for policy in range(5):
            for head in range(3):
                assert torch.equal(gathered[policy, head], keys[head, kept[policy, head].cpu()])
    assert torch.equal(*rankings)


@on_devices
def test_latency_is_measured_on_the_device(device: str, make_model: MakeModel) -> None:
    model = copy.deepcopy(make_model("llama")).to(device, torch.bfloat16)  # type: ignore[call-overload]
    agent = AgentParams(hidden_width=8, hidden_layers=1, inputs=("key", "value", "age"))
    policy = Policy(PolicyShape(*head_shape(model), agent), torch.Generator().manual_seed(0)).to(device)
    table = measure_latency(model, policy, [64, 128], repeats=1)
    assert len(table) == 8
    assert (table["seconds"] > 0).all()
