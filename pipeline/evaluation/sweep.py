"""The sweep: one prefill per sample, every policy, every budget.

Every policy is asked for its scores while the prompt is prefilled; each policy ranks once; each budget is
a prefix of that ranking; all (policy, budget) pairs then decode together. Policies see the whole prompt; its
last token, which every budget keeps, is then fed once more against the evicted cache, so that every
predicted token, the first included, comes from what is left. A late question comes after the eviction.
Layers that slide over a window are not ranked: they hold what they hold in a plain run. "Layers" below are
the others, in the order of ``pipeline/models/layout.py``.
It reads and writes no files; ``pipeline/evaluation/results.py`` names the columns.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.benchmarks.choice import choice_outcome
from pipeline.benchmarks.metrics import scorer
from pipeline.errors import PipelineError
from pipeline.evaluation.decode import EvictedCache, choice_nll, continuation_nll, greedy_decode
from pipeline.evaluation.sliding import SlidingLayer
from pipeline.eviction.baselines import BASELINES, OBSERVED_QUERIES, SHORTEST_CACHE, LayerCache
from pipeline.eviction.budget import gather_tokens, kept_tokens, protected_ranking
from pipeline.models.forward import require_finite
from pipeline.models.layers import ModelLayer, RankedLayer
from pipeline.models.layout import CacheLayout, cache_layout
from pipeline.models.load import end_token_ids
from pipeline.params import EvaluationParams, MatrixParams, TracesParams
from pipeline.policy.agents import Policy
from pipeline.policy.ranking import cost_at_budgets, optimal_total_cost, rank, total_cost
from pipeline.samples.sample import Sample
from pipeline.traces.capture import ObservedLayer, Tails, run_captured
from pipeline.traces.importance import future_importance

# Cost curves are drawn on these fractions of the cache: k / COST_GRID, k = 1 .. COST_GRID - 1.
COST_GRID = 16


@dataclass(frozen=True)
class PolicyKey:
    """How a row of the results names its policy."""

    policy: str
    trained_on: str | None = None


FULL, ORACLE = PolicyKey("full"), PolicyKey("oracle")


def policy_directories(root: Path, matrix: MatrixParams) -> dict[PolicyKey, Path]:
    """Where the policies of a model lie below ``root``.

    Only what the matrix lists: a policy that was dropped from it may still lie on disk.
    """
    return {
        PolicyKey(f"kvp-{estimator}", source): root / source / estimator
        for source in matrix.corpus
        for estimator in matrix.estimator
    }


@dataclass(frozen=True)
class Prefill:
    """One prefilled context of n tokens, and what followed it.

    Attributes
    ----------
    keys, values
        Per layer (1, kv_heads, n, head_dim): the whole cache.
    scores
        cache size -> policy -> (layers, kv_heads, cache size) float32, higher = keep.
    importance
        cache size -> (layers, kv_heads, cache size) float32, true future importance.
    windows
        Number of a sliding layer -> keys and values, (kv_heads, window - 1, head_dim) or fewer: what it holds
        when the last prompt token comes.
    """

    keys: list[Tensor]
    values: list[Tensor]
    scores: dict[int, dict[PolicyKey, Tensor]]
    importance: dict[int, Tensor]
    windows: dict[ModelLayer, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Outcome:
    """What one (policy, budget) pair did on one sample. ``budget`` is None for no eviction."""

    key: PolicyKey
    budget: int | None
    metric: str
    value: float
    n_tokens: int


@dataclass(frozen=True)
class Costs:
    """Cost of one policy's ranking at one cache size.

    Attributes
    ----------
    budgets
        (b,) the grid.
    cost, optimal
        (layers, kv_heads, b): importance of the evicted tokens, by the policy and by the best order.
    total, optimal_total
        (layers, kv_heads): summed over all budgets 1 .. cache_size - 1.
    """

    key: PolicyKey
    cache_size: int
    budgets: Tensor
    cost: Tensor
    optimal: Tensor
    total: Tensor
    optimal_total: Tensor


@dataclass
class Sweep:
    """Runs the sweep of one model.

    Parameters
    ----------
    policies
        trained_on, estimator -> policy, on the model's device.
    budgets
        Tokens kept per head, ascending; none where only the uncompressed cache is of interest.
    whole_if_shorter
        Whether a context shorter than a budget stays whole there, as in benchmarks whose contexts differ
        much; otherwise it is an error.
    answer_perplexity
        Whether the perplexity of the true answer is measured besides the score of the generated text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    policies: Mapping[PolicyKey, Policy]
    evaluation: EvaluationParams
    traces: TracesParams
    budgets: tuple[int, ...]
    whole_if_shorter: bool = False
    answer_perplexity: bool = False
    end_tokens: frozenset[int] = field(init=False)
    layout: CacheLayout = field(init=False)

    def __post_init__(self) -> None:
        self.layout = cache_layout(self.model)
        self.end_tokens = end_token_ids(self.model)

    @property
    def layers(self) -> tuple[ModelLayer, ...]:
        """The model's numbers of the ranked layers."""
        return self.layout.ranked

    def check(self, samples: Sequence[Sample]) -> None:
        """Refuse samples that :meth:`run` would refuse, before the first of them is run.

        Raises
        ------
        PipelineError
            A budget is larger than a sample's cache, or a context is too short to be ranked.
        """
        for sample in samples:
            n = sample.context_len
            if max(self.budgets, default=0) > n and not self.whole_if_shorter:
                raise PipelineError(
                    f"evaluation.budgets: {self.budgets[-1]} is larger than the cache of sample {sample.sample_id}, "
                    f"{n} tokens; lower the budget or use longer samples."
                )
            if n < SHORTEST_CACHE:
                raise PipelineError(
                    f"Sample {sample.sample_id} has a context of {n} tokens; ranking needs {SHORTEST_CACHE}: drop it."
                )

    def run(self, sample: Sample, seed: int) -> tuple[list[Outcome], list[Costs]]:
        """Evaluate every (policy, budget) pair on one sample.

        Raises
        ------
        PipelineError
            As for :meth:`check`; or a score, a key, a value or a logit is not finite.
        """
        self.check([sample])
        n = sample.context_len
        prefill = self.prefill(sample, seed)
        rankings = {
            key: protected_ranking(scores, self.evaluation.n_sink, self.evaluation.n_recent)
            for key, scores in prefill.scores[n].items()
        }
        if sample.choices:
            outcomes = self._choose(sample, prefill, rankings)
        else:
            reserve = max(len(sample.input_ids), sample.prompt_len + sample.max_new_tokens) - n
            cache, rows = self.evict(prefill, rankings, reserve)
            outcomes = []
            # The likelihoods come first: generating drops the rows that have finished.
            if self.answer_perplexity or sample.metric == "nll":
                outcomes += self._score(sample, cache, rows)
                cache.rewind()
            if sample.metric != "nll":
                outcomes += self._generate(sample, cache, rows)
        outcomes += [
            # Where nothing is evicted, every policy is the plain model: that row was run once.
            replace(outcome, key=key, budget=budget)
            for budget in self.budgets
            if budget >= n
            for key in rankings
            for outcome in outcomes
            if outcome.key == FULL
        ]
        return outcomes, [
            costs
            for size, scores in prefill.scores.items()
            for costs in ranking_costs(prefill.importance[size], scores)
        ]

    def prefill(self, sample: Sample, seed: int) -> Prefill:
        """Prefill the context once, score it with every policy, and look at what followed.

        Policies are scored at a second cache size, the middle, where a block of the record ends there.
        """
        chunk = self.traces.query_chunk
        n = sample.context_len
        middle = n // 2 // self.traces.block_size * self.traces.block_size
        ids = torch.tensor(sample.input_ids)
        cache = DynamicCache()
        sizes = tuple(size for size in (middle, n) if size and self.budgets)
        collected: dict[int, dict[PolicyKey, list[Tensor]]] = {size: {} for size in sizes}

        def score(index: RankedLayer, layer: ObservedLayer) -> None:
            for size, by_key in collected.items():
                keys, values = layer.keys[:, :size], layer.values[:, :size]  # attention is causal
                found = {key: policy(keys, values, layer=index) for key, policy in self.policies.items()}
                view = LayerCache(layer.number, keys, values, layer.tails[size], seed)
                found |= {PolicyKey(name): baseline(view) for name, baseline in BASELINES.items()}
                for key, scores in found.items():
                    by_key.setdefault(key, []).append(scores)

        tails = Tails(sizes, OBSERVED_QUERIES)
        # Blocks as large as can be: a record of traces' blocks grows with n x n, 4 GB a layer at 128k tokens.
        prompt = run_captured(self.model, ids[:n], cache, middle or n, chunk, tails, score)
        # The true continuation runs against the uncompressed cache; its attention is the oracle's knowledge.
        after = run_captured(self.model, ids[n:], cache, len(ids), chunk)
        beyond = torch.stack([record[:, :n].sum(-1) for record in after])
        importance = {n: beyond}
        if middle:
            within = torch.stack([future_importance(record, middle, middle) for record in prompt])
            importance[middle] = within + beyond[..., :middle]
        scores = {
            size: {key: torch.stack(layers) for key, layers in by_key.items()} for size, by_key in collected.items()
        }
        for size, by_policy in scores.items():
            by_policy[ORACLE] = importance[size]
            for key, found in by_policy.items():
                require_finite(self.model, found, f"sample {sample.sample_id}: a score of {key.policy}")
        states = [(layer[0], layer[1]) for layer in cache]  # (1, kv_heads, tokens, head_dim)
        keys, values = ([states[layer][index][:, :, :n] for layer in self.layers] for index in (0, 1))
        windows = {}
        for layer, window in self.layout.windows.items():
            held = slice(max(0, n - window), n - 1)
            windows[layer] = (states[layer][0][0, :, held], states[layer][1][0, :, held])
        return Prefill(keys, values, scores, importance, windows)

    def evict(
        self, prefill: Prefill, rankings: Mapping[PolicyKey, Tensor], reserve: int
    ) -> tuple[EvictedCache, list[tuple[PolicyKey, int | None]]]:
        """Build the evicted cache of all pairs that evict anything; returns it with the (policy, budget) of each row.

        The last context token counts towards the budget, but is left out: it is fed again.
        """
        n = prefill.keys[0].shape[2]
        sliding = {
            layer: SlidingLayer(self.layout.windows[layer], *states) for layer, states in prefill.windows.items()
        }
        cache = EvictedCache(reserve, sliding)
        rows: list[tuple[PolicyKey, int | None]] = []
        for budget in (budget for budget in self.budgets if budget < n):
            # Sorted by position, and the last token is protected: it comes last.
            kept = {key: kept_tokens(ranking, budget)[..., :-1] for key, ranking in rankings.items()}
            # index: (policies, kv_heads, budget - 1) per layer
            by_layer = torch.stack(list(kept.values()), dim=1)
            groups = [
                [gather_tokens(layer[0], index) for layer, index in zip(states, by_layer, strict=True)]
                for states in (prefill.keys, prefill.values)
            ]
            cache.add_group(*groups)
            rows += [(key, budget) for key in kept]
        cache.add_group(*([layer[:, :, :-1] for layer in states] for states in (prefill.keys, prefill.values)))
        rows.append((FULL, None))
        return cache, rows

    def _generate(
        self, sample: Sample, cache: EvictedCache, rows: Sequence[tuple[PolicyKey, int | None]]
    ) -> list[Outcome]:
        score = scorer(sample)
        # A longer text contains every answer that a shorter one does: a full score cannot change.
        may_stop_early = sample.metric == "string_match"

        def text(tokens: Sequence[int]) -> str:
            decoded = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert isinstance(decoded, str)
            return decoded

        def is_finished(tokens: list[int]) -> bool:
            return tokens[-1] in self.end_tokens or (may_stop_early and score(text(tokens)) == 1.0)

        last = sample.context_len - 1
        first_tokens = sample.input_ids[last : sample.prompt_len]
        generated = greedy_decode(self.model, cache, first_tokens, last, sample.max_new_tokens, is_finished)
        return [
            Outcome(key, budget, sample.metric, score(text(tokens)), len(tokens))
            for (key, budget), tokens in zip(rows, generated, strict=True)
        ]

    def _score(
        self, sample: Sample, cache: EvictedCache, rows: Sequence[tuple[PolicyKey, int | None]]
    ) -> list[Outcome]:
        last = sample.context_len - 1
        # Tokens of a late question are read, not predicted.
        predicted = len(sample.input_ids) - sample.prompt_len
        nll = continuation_nll(self.model, cache, torch.tensor(sample.input_ids[last:]), last)[:, -predicted:]
        return [
            Outcome(key, budget, "nll", value, predicted)
            for (key, budget), value in zip(rows, nll.double().mean(-1).tolist(), strict=True)
        ]

    def score_choices(
        self, sample: Sample, prefill: Prefill, rankings: Mapping[PolicyKey, Tensor]
    ) -> tuple[Tensor, list[tuple[PolicyKey, int | None]]]:
        """Negative log-likelihood of every choice, (rows, choices) float32, and the (policy, budget) of each row."""
        last = sample.context_len - 1
        first_tokens = sample.input_ids[last : sample.prompt_len]
        cache, rows = self.evict(prefill, rankings, len(first_tokens) + max(map(len, sample.choices)) - 1)
        return choice_nll(self.model, cache, first_tokens, sample.choices, last), rows

    def _choose(self, sample: Sample, prefill: Prefill, rankings: Mapping[PolicyKey, Tensor]) -> list[Outcome]:
        nll, rows = self.score_choices(sample, prefill, rankings)
        return [
            Outcome(key, budget, sample.metric, choice_outcome(row, sample.answers, sample.metric, sample.gold), 1)
            for (key, budget), row in zip(rows, nll.tolist(), strict=True)
        ]


def ranking_costs(importance: Tensor, scores: Mapping[PolicyKey, Tensor]) -> Iterator[Costs]:
    """Cost of every policy's own order, before any token is protected, so that the oracle's is the best.

    Parameters
    ----------
    importance, scores
        (layers, kv_heads, n).
    """
    cache_size = importance.shape[-1]
    budgets = torch.tensor([cache_size * k // COST_GRID for k in range(1, COST_GRID)])
    optimal = cost_at_budgets(importance, rank(importance), budgets)
    optimal_total = optimal_total_cost(importance)
    for key, score in scores.items():
        ranking = rank(score)
        cost = cost_at_budgets(importance, ranking, budgets)
        yield Costs(key, cache_size, budgets, cost, optimal, total_cost(importance, ranking), optimal_total)
