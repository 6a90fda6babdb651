"""The sweep: one prefill per sample, every policy, every budget, real eviction.

Each policy ranks once; each budget is a prefix of that ranking; all (policy, budget) pairs then decode together. It
reads and writes no files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import PipelineError
from pipeline.evaluation.ask import Said, ask, reserve
from pipeline.evaluation.costs import Costs, ranking_costs
from pipeline.evaluation.evict import evict
from pipeline.evaluation.prefill import Prefill, prefill_sample
from pipeline.eviction.baselines.base import SHORTEST_CACHE
from pipeline.eviction.budget import EvaluationParams, protected_ranking
from pipeline.eviction.rankers import Ranker
from pipeline.models.layout import CacheLayout, cache_layout
from pipeline.models.load import end_token_ids
from pipeline.policy.agents import Policy
from pipeline.samples.sample import Sample
from pipeline.tables import FULL, PolicyKey


@dataclass
class Sweep:
    """Runs the sweep of one model.

    Parameters
    ----------
    policies
        Each on the model's device.
    rankers
        The baselines, by name.
    budgets
        Tokens kept per head, ascending; none where only the uncompressed cache is of interest.
    whole_if_shorter
        Whether a context shorter than a budget stays whole there, as in benchmarks whose contexts differ
        much; otherwise it is an error.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    policies: Mapping[PolicyKey, Policy]
    rankers: Mapping[str, Ranker]
    evaluation: EvaluationParams
    budgets: tuple[int, ...]
    whole_if_shorter: bool = False
    end_tokens: frozenset[int] = field(init=False)
    layout: CacheLayout = field(init=False)

    def __post_init__(self) -> None:
        self.layout = cache_layout(self.model)
        self.end_tokens = end_token_ids(self.model)

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

    def prefill(self, sample: Sample, seed: int) -> Prefill:
        """See :func:`pipeline.evaluation.prefill.prefill_sample`."""
        ranked = bool(self.budgets)
        return prefill_sample(self.model, sample, self.policies, self.rankers, seed, ranked)

    def run(self, sample: Sample, seed: int) -> tuple[list[Said], list[Costs]]:
        """Ask every (policy, budget) pair what one sample asks.

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
            for key, scores in prefill.scores.get(n, {}).items()
        }
        cache, rows = evict(prefill, rankings, self.budgets, self.layout.windows, reserve(sample))
        said = list(ask(sample, cache, rows, self.model, self.tokenizer, self.end_tokens))
        said += [
            # Where nothing is evicted, every policy is the plain model: that row was run once.
            replace(found, key=key, budget=budget)
            for budget in self.budgets
            if budget >= n
            for key in rankings
            for found in said
            if found.key == FULL
        ]
        return said, [
            costs
            for size, scores in prefill.scores.items()
            for costs in ranking_costs(prefill.importance[size], scores)
        ]
