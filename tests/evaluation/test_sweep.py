"""The sweep on a tiny model: its rows, its oracle and its likelihoods against plain computations."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from pipeline.benchmarks.base import Benchmark
from pipeline.errors import PipelineError
from pipeline.evaluation.answers import answer_table
from pipeline.evaluation.ask import Said
from pipeline.evaluation.costs import ranking_costs
from pipeline.evaluation.score import score_answers
from pipeline.evaluation.sweep import Sweep
from pipeline.eviction.budget import EvaluationParams
from pipeline.models.layers import full_attention_layers
from pipeline.models.load import head_shape
from pipeline.params import Params
from pipeline.policy.agents import AgentParams, Policy, PolicyShape
from pipeline.samples.sample import Sample
from pipeline.tables import FULL, GRID, ORACLE, PolicyKey
from tests.benchmarks.making import choice as make_choice
from tests.conftest import FAMILIES, MakeModel
from tests.eviction.prefills import RANKERS, layer_caches

IDS = (torch.arange(209) * 37 % 125 + 3).tolist()
PROMPT_LEN = 201
N = PROMPT_LEN
MIDDLE = N // 2
AGENT = AgentParams(hidden_width=8, hidden_layers=1, inputs=("key", "value", "age"))
TRAINED = {PolicyKey("kvp-exact", "ruler"): 0, PolicyKey("kvp-exact", "dialogues"): 1}  # and the seed of each


class Letters:
    """A tokenizer of which the sweep needs one method: token 3 is "d", 4 is "e", and so on, 26 letters."""

    def decode(
        self, tokens: Sequence[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool = False
    ) -> str:
        return "".join(chr(ord("a") + token % 26) for token in tokens)


def make_sample(answers: tuple[str, ...] = (), question_start: int | None = None) -> Sample:
    return Sample(
        sample_id="s",
        benchmark="ruler" if answers else "dialogues",
        task="vt" if answers else "dialogues",
        split="test",
        input_ids=tuple(IDS),
        prompt_len=PROMPT_LEN,
        question_start=question_start,
        answers=answers,
        max_new_tokens=6 if answers else 0,
        meta="{}",
        ask=("likelihood", "text") if answers else ("likelihood",),
        enough=(answers,) if answers else (),
    )


def make_sweep(model: PreTrainedModel, budgets: tuple[int, ...] = (24, 48, N)) -> Sweep:
    evaluation = EvaluationParams(budgets=budgets, n_sink=4, n_recent=16, seed=0)
    policies = {
        key: Policy(PolicyShape(*head_shape(model), AGENT), torch.Generator().manual_seed(seed))
        for key, seed in TRAINED.items()
    }
    return Sweep(model, Letters(), policies, RANKERS, evaluation, budgets)  # type: ignore[arg-type]


Rows = dict[tuple[PolicyKey, int | None], "Outcome"]


def expected_rows(budgets: Sequence[int]) -> set[tuple[PolicyKey, int | None]]:
    keys = {*TRAINED, ORACLE, *map(PolicyKey, RANKERS)}
    return {(key, budget) for key in keys for budget in budgets} | {(FULL, None)}


@dataclass(frozen=True)
class Outcome:
    """What a row of the results says."""

    value: float
    n_tokens: int


@pytest.fixture(scope="module")
def ruler(default_params: Params) -> Benchmark:
    return default_params.benchmarks["ruler"].samples


def judged(said: Sequence[Said], sample: Sample, benchmark: Benchmark | None = None) -> dict[str, Rows]:
    """metric -> row -> its outcome; likelihoods need no benchmark."""
    found: dict[str, Rows] = {}
    table = score_answers(benchmark or make_choice("boolq"), [sample], answer_table("tiny", sample, said))
    for row in table.iter_rows(named=True):
        rows = found.setdefault(row["metric"], {})
        pair = (PolicyKey(row["policy"], row["trained_on"]), row["budget"])
        assert pair not in rows
        rows[pair] = Outcome(row["value"], row["n_tokens"])
    return found


def likelihoods(sweep: Sweep, sample: Sample, seed: int = 1) -> Rows:
    return judged(sweep.run(sample, seed)[0], sample)["nll"]


def eager_importance(model: PreTrainedModel, cache_size: int, last: int) -> Tensor:
    """Future importance (layers, kv_heads, cache_size) in float64, from the definition.

    Maximum over the heads of a group, summed over the queries cache_size .. last - 1.
    """
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(torch.tensor(IDS)[None], output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    layers = []
    for number in full_attention_layers(model.config):
        grouped = attentions[number][0].double().view(2, 3, len(IDS), len(IDS))  # (kv_heads, group, queries, tokens)
        layers.append(grouped.amax(1)[:, cache_size:last, :cache_size].sum(1))
    return torch.stack(layers)


@pytest.mark.parametrize("answers", [(), ("zzz",)], ids=["perplexity", "text"])
def test_the_rows_are_policies_times_budgets_and_full(
    answers: tuple[str, ...], make_model: MakeModel, ruler: Benchmark
) -> None:
    said, costs = make_sweep(make_model("llama")).run(make_sample(answers), seed=1)
    found = judged(said, make_sample(answers), ruler)
    assert set(found) == ({"nll", "string_match"} if answers else {"nll"})  # perplexity besides accuracy
    for rows in found.values():
        assert set(rows) == expected_rows((24, 48, N))
    assert all(1 <= one.n_tokens <= 8 for one in said)
    assert {(cost.key, cost.cache_size) for cost in costs} == {
        (key, size) for key, budget in expected_rows((1,)) if budget for size in (MIDDLE, N)
    }


@pytest.mark.parametrize("answers", [(), ("zzz",)], ids=["perplexity", "text"])
def test_what_was_said_is_kept_as_it_is(answers: tuple[str, ...], make_model: MakeModel) -> None:
    said, _ = make_sweep(make_model("llama")).run(make_sample(answers), seed=1)
    for one in said:
        if one.ask == "likelihood":
            assert (one.text, len(one.nll), one.n_tokens) == (None, 8, 8)
        else:
            assert (one.ask, one.nll) == ("text", ())
            assert one.text is not None
            assert len(one.text) == one.n_tokens == 6  # nothing was found before


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_oracle_knows_the_true_importance_at_both_cache_sizes(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    prefill = make_sweep(model).prefill(make_sample(), seed=1)
    assert set(prefill.importance) == {MIDDLE, N}
    for size in (MIDDLE, N):
        expected = eager_importance(model, size, len(IDS))
        torch.testing.assert_close(prefill.importance[size].double(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(prefill.scores[size][ORACLE], prefill.importance[size])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_policies_and_baselines_are_scored_as_after_a_plain_prefill(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    sweep = make_sweep(model)
    prefill = sweep.prefill(make_sample(), seed=5)
    for size in (MIDDLE, N):
        caches = layer_caches(model, torch.tensor(IDS[:size]), seed=5)
        for layer, number in enumerate(full_attention_layers(model.config)):
            cache = caches[number]
            for name, score in RANKERS.items():
                if name != "lagkv":
                    found = prefill.scores[size][PolicyKey(name)][layer]
                    torch.testing.assert_close(found, score(cache), rtol=1e-3, atol=1e-4)
            for key, policy in sweep.policies.items():
                with torch.no_grad():
                    expected = policy(cache.keys, cache.values, layer=layer)
                torch.testing.assert_close(prefill.scores[size][key][layer], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_full_is_the_plain_model_and_keeping_all_equals_full(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    rows = likelihoods(make_sweep(model), make_sample())
    with torch.no_grad():
        logits = model(torch.tensor(IDS)[None]).logits[0, PROMPT_LEN - 1 : -1]
    expected = F.cross_entropy(logits[1:], torch.tensor(IDS[PROMPT_LEN + 1 :])).item()
    whole = F.cross_entropy(logits, torch.tensor(IDS[PROMPT_LEN:])).item()
    assert whole != pytest.approx(expected)  # the first token of the continuation counts
    assert rows[FULL, None].value == pytest.approx(whole, rel=1e-4)
    assert rows[FULL, None].n_tokens == len(IDS) - PROMPT_LEN
    evicted = set()
    for (key, budget), outcome in rows.items():
        if budget == N:
            assert outcome.value == rows[FULL, None].value, key
        elif budget is not None:
            evicted.add(round(outcome.value, 4))
    assert len(evicted) > 10  # small budgets do change the likelihood, each in its own way


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_full_writes_what_generate_writes(family: str, make_model: MakeModel, ruler: Benchmark) -> None:
    model = make_model(family)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor(IDS[:PROMPT_LEN])[None],
            attention_mask=torch.ones(1, PROMPT_LEN, dtype=torch.long),
            max_new_tokens=6,
            do_sample=False,
        )
    text = Letters().decode(expected[0, PROMPT_LEN:].tolist(), skip_special_tokens=True)
    sample = make_sample((text[:3], "zzzzzz"))
    rows = judged(make_sweep(model).run(sample, seed=1)[0], sample, ruler)["string_match"]
    assert rows[FULL, None].value == 0.5
    assert {rows[key, N].value for key in (ORACLE, *TRAINED)} == {0.5}
    # With every answer found the row is finished, before all tokens are written.
    sample = make_sample((text[:3],))
    rows = judged(make_sweep(model).run(sample, seed=1)[0], sample, ruler)["string_match"]
    assert (rows[FULL, None].value, rows[FULL, None].n_tokens) == (1.0, 3)
    # So it is where any of several groups is complete.
    sample = dataclasses.replace(sample, enough=(("zzzzzz",), (text[0].upper(), text[:2])))
    said = {(one.key, one.budget): one for one in make_sweep(model).run(sample, seed=1)[0] if one.ask == "text"}
    assert said[FULL, None].text == text[:2]


def test_a_seed_changes_random_only(make_model: MakeModel) -> None:
    sweep = make_sweep(make_model("llama"))
    one, other = (likelihoods(sweep, make_sample(), seed) for seed in (1, 2))
    changed = {key.policy for key, budget in one if one[key, budget] != other[key, budget]}
    assert changed == {"random"}


def test_a_budget_above_the_cache_is_one_sentence(make_model: MakeModel) -> None:
    with pytest.raises(
        PipelineError, match=r"evaluation\.budgets: 202 is larger than the cache of sample s, 201 tokens"
    ):
        make_sweep(make_model("llama"), (24, N + 1)).run(make_sample(), seed=1)


def test_perplexity_beside_accuracy_is_a_choice_that_changes_no_text(make_model: MakeModel) -> None:
    sweep, sample = make_sweep(make_model("llama")), make_sample(("zzz", "a"))
    both, _ = sweep.run(sample, seed=1)
    alone, _ = sweep.run(dataclasses.replace(sample, ask=("text",)), seed=1)
    assert {one.ask for one in alone} == {"text"}
    assert alone == [one for one in both if one.ask == "text"]


def test_a_context_shorter_than_a_budget_stays_whole_where_that_is_allowed(make_model: MakeModel) -> None:
    sweep = dataclasses.replace(make_sweep(make_model("llama"), (24, N + 1)), whole_if_shorter=True)
    rows = likelihoods(sweep, make_sample())
    for key in TRAINED:
        assert rows[key, N + 1].value == pytest.approx(rows[FULL, None].value, rel=1e-4)
        assert rows[key, 24].value != pytest.approx(rows[FULL, None].value, rel=1e-4)


def test_a_short_context_is_ranked_at_one_cache_size(make_model: MakeModel) -> None:
    short = dataclasses.replace(make_sample(), prompt_len=3)  # half of it is one token
    sweep = dataclasses.replace(make_sweep(make_model("llama"), (24,)), whole_if_shorter=True)
    said, costs = sweep.run(short, seed=1)
    assert set(judged(said, short)["nll"]) == expected_rows((24,))
    assert {cost.cache_size for cost in costs} == {3}
    with pytest.raises(PipelineError, match=r"Sample s has a context of 1 tokens; ranking needs 2: drop it"):
        sweep.run(dataclasses.replace(make_sample(), prompt_len=1), seed=1)


LATE = 170


def test_a_late_question_is_no_part_of_the_compressed_context(make_model: MakeModel) -> None:
    model = make_model("llama")
    sweep = make_sweep(model, (24, LATE))
    sample = make_sample(question_start=LATE)
    prefill = sweep.prefill(sample, seed=1)
    assert prefill.keys[0].shape[2] == LATE
    importance = prefill.importance[LATE].double()
    torch.testing.assert_close(importance, eager_importance(model, LATE, len(IDS)), rtol=1e-4, atol=1e-5)
    rows = likelihoods(sweep, sample)
    whole = likelihoods(make_sweep(model, (24,)), make_sample())[FULL, None]
    # Only the answer's tokens count, and without eviction the place of the question changes nothing.
    assert rows[FULL, None].n_tokens == whole.n_tokens == len(IDS) - PROMPT_LEN
    assert rows[FULL, None].value == pytest.approx(whole.value, rel=1e-4)
    assert rows[ORACLE, LATE].value == pytest.approx(whole.value, rel=1e-4)
    assert rows[ORACLE, 24].value != pytest.approx(whole.value, rel=1e-4)


@pytest.mark.parametrize("question_start", [None, LATE], ids=["inside", "late"])
def test_full_chooses_what_the_plain_model_chooses(question_start: int | None, make_model: MakeModel) -> None:
    model = make_model("llama")
    choices = ((5, 9), (77,), (31, 8, 60), (100,))
    nll = []
    for choice in choices:
        text = torch.tensor([*IDS[:PROMPT_LEN], *choice])
        with torch.no_grad():
            logits = model(text[None]).logits[0, PROMPT_LEN - 1 : -1]
        nll.append(F.cross_entropy(logits, torch.tensor(choice), reduction="sum").item())
    best = min(range(4), key=nll.__getitem__)
    for gold in range(4):
        sample = dataclasses.replace(
            make_sample(question_start=question_start),
            choices=choices, gold=gold, answers=("a", "bb", "cc", "d"), ask=("choice",),
        )  # fmt: skip
        said, _ = make_sweep(model, (24, 48)).run(sample, seed=1)
        (plain,) = (one for one in said if one.key == FULL)
        assert plain.nll == pytest.approx(nll, rel=1e-4)
        rows = judged(said, sample)["accuracy"]
        assert set(rows) == expected_rows((24, 48))
        assert rows[FULL, None].value == float(gold == best)


def test_hooks_are_gone_after_a_sweep(make_model: MakeModel) -> None:
    model = make_model("llama")
    before = [len(module._forward_hooks) for module in model.modules()]
    make_sweep(model).run(make_sample(), seed=1)
    assert [len(module._forward_hooks) for module in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"


def test_costs_are_sums_of_evicted_importance_and_the_oracles_are_the_least() -> None:
    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(2, 3, 40, generator=generator)
    scores = {ORACLE: importance, PolicyKey("random"): torch.rand(2, 3, 40, generator=generator)}
    oracle, random = ranking_costs(importance, scores)
    assert torch.equal(oracle.cost, oracle.optimal)
    assert torch.equal(oracle.total, oracle.optimal_total)
    assert (random.cost > random.optimal).all()
    assert (random.total > random.optimal_total).all()
    assert random.budgets.tolist() == [40 * k // GRID for k in range(1, GRID)]
    for layer in range(2):
        for head in range(3):
            order = sorted(range(40), key=lambda token: -random_score(scores, layer, head, token))
            lost = [sum(float(importance[layer, head, token]) for token in order[budget:]) for budget in range(1, 40)]
            assert random.total[layer, head].item() == pytest.approx(sum(lost), rel=1e-5)
            for point, budget in enumerate(random.budgets.tolist()):
                assert random.cost[layer, head, point].item() == pytest.approx(lost[budget - 1], rel=1e-5)


def random_score(scores: dict[PolicyKey, Tensor], layer: int, head: int, token: int) -> float:
    return float(scores[PolicyKey("random")][layer, head, token])
