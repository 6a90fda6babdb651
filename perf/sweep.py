"""The sweep of one sample beside kvpress-style evaluation: a prefill and a decode for each (policy, budget).

RULER at 1k and 4k, 10 policies x 8 budgets, 32 generated tokens. The other side compresses with kvpress's hooks
during a plain transformers prefill and decodes one row with transformers' own cache and attention; it keeps the
same tokens, so that the texts can be compared. A model of random weights (--random) has no tokenizer: its context is
random tokens. By default it runs one budget of each policy, another one
for each, and its time is multiplied by the number of budgets; --all-pairs runs all of them.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from kvpress import BasePress, SnapKVPress
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from perf.measure import benchmark_model, interleaved, median_ratio, wait, write_result
from pipeline.benchmarks.base import AllSizes
from pipeline.benchmarks.base_making import make_samples
from pipeline.benchmarks.ruler import Ruler
from pipeline.evaluation.decode import greedy_decode
from pipeline.evaluation.evict import evict
from pipeline.evaluation.sweep import Sweep
from pipeline.eviction.baselines.base import OBSERVED_QUERIES, Baseline, LayerCache
from pipeline.eviction.budget import EvaluationParams, gather_tokens, kept_tokens, protected_ranking
from pipeline.eviction.rankers import make_rankers
from pipeline.models.load import head_shape
from pipeline.models.tokenizer import load_tokenizer
from pipeline.policy.agents import AgentParams, Policy, PolicyShape
from pipeline.samples.sample import Sample
from pipeline.section import read
from pipeline.sources.pins import SourceParams
from pipeline.tables import FULL, ORACLE, PolicyKey

BUDGETS = (48, 64, 96, 128, 192, 256, 384, 512)
NEW_TOKENS = 32
DEFAULT = Path("profiles/default.yaml")
TASK = "niah_multiquery"
SEED = 0
# Policy -> how many of the last queries it looks at.
OBSERVED = {"snapkv": OBSERVED_QUERIES, "tova": 1}


@dataclass
class OneBudget(BasePress):  # type: ignore[misc]  # kvpress is untyped
    """Keeps what one policy ranks first, as the sweep does; the last token is left out, to be fed again."""

    score: Callable[[LayerCache], Tensor]
    queries: int  # whose attention is looked at
    budget: int
    evaluation: EvaluationParams

    def compress(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (1, kv_heads, budget - 1, head_dim)."""
        weights = hidden_states.new_zeros(1, module.config.num_attention_heads, 0, keys.shape[2] - self.queries)
        if self.queries:  # as kvpress itself does it: queries are computed again
            weights = SnapKVPress.compute_window_attention(
                module, hidden_states, keys, self.queries, kwargs["position_embeddings"]
            )
        attention = F.pad(weights[0].float(), (0, self.queries))
        scores = self.score(LayerCache(module.layer_idx, keys[0], values[0], attention, SEED))
        ranking = protected_ranking(scores, self.evaluation.n_sink, self.evaluation.n_recent)
        kept = kept_tokens(ranking, self.budget)[None, :, :-1]
        return gather_tokens(keys[0], kept), gather_tokens(values[0], kept)


@torch.inference_mode()
def one_pair(model: PreTrainedModel, press: BasePress, ids: Tensor, end_tokens: frozenset[int]) -> list[int]:
    """Prefill under ``press``, then decode greedily from what it leaves."""
    cache = DynamicCache(config=model.config)
    with press(model):
        model(ids[None], past_key_values=cache, logits_to_keep=1)
    token, generated = ids[None, -1:], []
    for position in range(len(ids) - 1, len(ids) - 1 + NEW_TOKENS):
        # Kept tokens keep their positions: the new ones follow the whole context, not the smaller cache.
        where = torch.tensor([[position]], device=ids.device)
        logits = model(token, past_key_values=cache, position_ids=where).logits
        token = logits[:, -1:].argmax(-1)
        generated.append(int(token))
        if generated[-1] in end_tokens:
            break
    return generated


@torch.inference_mode()
def whole_sweep(sweep: Sweep, sample: Sample) -> tuple[dict[tuple[PolicyKey, int | None], list[int]], dict[str, float]]:
    """What :meth:`Sweep.run` does for a generated text, costs aside, with its tokens and the seconds of its parts."""
    device = sweep.model.device.type
    started = time.perf_counter()
    prefill = sweep.prefill(sample, SEED)
    wait(device)
    prefilled = time.perf_counter()
    # The oracle cannot be had by the other side: it looks at the answer.
    scores = {key: found for key, found in prefill.scores[sample.context_len].items() if key != ORACLE}
    rankings = {
        key: protected_ranking(found, sweep.evaluation.n_sink, sweep.evaluation.n_recent)
        for key, found in scores.items()
    }
    cache, rows = evict(prefill, rankings, sweep.budgets, sweep.layout.windows, NEW_TOKENS)
    wait(device)
    evicted = time.perf_counter()
    last = sample.context_len - 1
    texts = greedy_decode(
        sweep.model,
        cache,
        sample.input_ids[last : last + 1],
        last,
        NEW_TOKENS,
        lambda text: text[-1] in sweep.end_tokens,
    )
    parts = {"prefill": prefilled - started, "evict": evicted - prefilled, "decode": time.perf_counter() - evicted}
    return dict(zip(rows, texts, strict=True)), parts


def make_sample(length: int, model_directory: Path) -> Sample:
    """The test sample of one RULER task at ``length`` tokens."""
    sources = read("sources", dict[str, SourceParams], DEFAULT)
    params = read("benchmarks.ruler.samples", Ruler, DEFAULT)
    changed = {"tasks": (TASK,), "length": length, "sizes": AllSizes(train=1, validation=1, test=1)}
    params = params.model_copy(update=changed)
    of_ruler = {role: sources[name] for role, name in params.sources.items()}
    with tempfile.TemporaryDirectory() as work:
        samples, _ = make_samples(params, "ruler", model_directory, of_ruler, Path(work))
        return samples["test"][0]


def random_sample(length: int, vocabulary: int) -> Sample:
    """A context of random tokens, and one token behind it."""
    ids = torch.randint(vocabulary, (length + 1,), generator=torch.Generator().manual_seed(SEED)).tolist()
    return Sample("random", "random", "random", "test", tuple(ids), length, None, ("",), NEW_TOKENS, "{}", ("text",))


def compare(
    sweep: Sweep,
    sample: Sample,
    scores: Mapping[PolicyKey, Callable[[LayerCache], Tensor]],
    pairs: Sequence[tuple[PolicyKey, int]],
    turns: int,
) -> dict[str, Any]:
    """One sweep and the pairs in turns; the time of the pairs is that of all policies and budgets."""
    ids = torch.tensor(sample.input_ids[: sample.context_len], device=sweep.model.device)
    answers: dict[str, Any] = {}

    def ours() -> None:
        answers["sweep"], answers["parts"] = whole_sweep(sweep, sample)

    def theirs() -> None:
        answers["pairs"] = [
            one_pair(
                sweep.model,
                OneBudget(scores[key], OBSERVED.get(key.policy, 0), budget, sweep.evaluation),
                ids,
                sweep.end_tokens,
            )
            for key, budget in pairs
        ]

    seconds = interleaved({"sweep": ours, "pairs": theirs}, turns, sweep.model.device.type, warm_up=0)
    whole = [measured * len(scores) * len(BUDGETS) / len(pairs) for measured in seconds["pairs"]]
    ratio, lowest, highest = median_ratio(whole, seconds["sweep"])
    texts = answers["sweep"]
    return {
        "context_tokens": len(ids),
        "sweep_seconds": statistics.median(seconds["sweep"]),
        "sweep_parts": answers["parts"],
        "full_text_tokens": len(texts[FULL, None]),
        "per_pair_seconds": statistics.median(whole),
        "pairs_measured": len(pairs),
        "equal_texts": sum(text == texts[pair] for text, pair in zip(answers["pairs"], pairs, strict=True)),
        "ratio": ratio,
        "lowest_ratio": lowest,
        "highest_ratio": highest,
    }


def main(
    model_directory: Annotated[Path, typer.Option(help="What the model stage wrote.")] = Path("models/smollm2-135m"),
    random: Annotated[str, typer.Option(help="A model of random weights instead (perf/measure.py).")] = "",
    device: str = "cpu",
    dtype: str = "float32",
    lengths: Annotated[str, typer.Option(help="Tokens, comma-separated.")] = "1024,4096",
    all_pairs: Annotated[bool, typer.Option(help="All pairs on the other side: 5 and 15 minutes a turn.")] = False,
    turns: Annotated[int, typer.Option(help="How often both sides run.")] = 3,
) -> None:
    """Time one sweep against one prefill and one decode per pair."""
    model = benchmark_model(random, model_directory, device, dtype)
    evaluation = EvaluationParams(budgets=BUDGETS, n_sink=4, n_recent=16, seed=SEED)
    agent = AgentParams(hidden_width=256, hidden_layers=2, inputs=("key", "value", "position", "age"))
    shape = PolicyShape(*head_shape(model), agent)
    # Untrained agents rank as fast as trained ones.
    policies = {
        PolicyKey("kvp", str(seed)): Policy(shape, torch.Generator().manual_seed(seed)).eval().to(device)
        for seed in range(3)
    }
    # Only RULER's text needs a tokenizer.
    tokenizer = cast(PreTrainedTokenizerBase, None) if random else load_tokenizer(model_directory)
    rankers = make_rankers(read("baselines", dict[str, Baseline], DEFAULT))
    sweep = Sweep(model, tokenizer, policies, rankers, evaluation, BUDGETS)
    scores: dict[PolicyKey, Callable[[LayerCache], Tensor]] = {
        key: lambda cache, policy=policy: policy(cache.keys, cache.values, layer=cache.number)
        for key, policy in policies.items()
    } | {PolicyKey(name): ranker for name, ranker in rankers.items()}
    found = {}
    for length in map(int, lengths.split(",")):
        sample = random_sample(length, model.config.vocab_size) if random else make_sample(length, model_directory)
        whole_sweep(sweep, sample)  # warm
        pairs = list(itertools.product(scores, BUDGETS))
        if not all_pairs:
            pairs = [(key, BUDGETS[place % len(BUDGETS)]) for place, key in enumerate(scores)]
        found[str(length)] = row = compare(sweep, sample, scores, pairs, turns)
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["sweep_parts"].items())
        print(
            f"{sample.benchmark} {sample.task}, {sample.context_len} tokens, {len(scores)} policies x {len(BUDGETS)} "
            f"budgets, {NEW_TOKENS} tokens: sweep {row['sweep_seconds']:.1f} s ({parts}), a prefill and a decode per "
            f"pair {row['per_pair_seconds']:.0f} s ({len(pairs)} pairs measured), ratio {row['ratio']:.1f} "
            f"({row['lowest_ratio']:.1f} to {row['highest_ratio']:.1f}); {row['equal_texts']} of {len(pairs)} texts "
            "equal",
            flush=True,
        )
    options = {"model": random or model_directory.name, "dtype": dtype, "policies": len(scores), "budgets": BUDGETS}
    print(write_result("sweep", device, {**options, "lengths": found}))


if __name__ == "__main__":
    typer.run(main)
