"""What a training step looks at: some examples side by side, read ahead of the step. It knows no agents.

Every draw depends on (seed, step) only, so a run resumed from a checkpoint ends with the same bytes.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.policy.estimators.base import Estimator, Target
from pipeline.policy.inputs.base import CachedTokens
from pipeline.traces.draws import generator
from pipeline.traces.example import RankingExample
from pipeline.traces.shards import ExampleReader

# Steps that are read ahead, in as many threads, so that a step waits neither for the disk nor for the way to a device.
_AHEAD = 4


@dataclass(frozen=True)
class Batch:
    """B examples, for all heads.

    Attributes
    ----------
    tokens
        (heads, t): of each head the known tokens of all examples, one after the other, as agents see no difference
        between examples. Heads with fewer than t are filled up.
    places
        (heads, t) int64: where in the (B, m) of the target each token is; no place twice.
    target
        (heads, B, m); an example with fewer than m known tokens is filled up with such that count nothing.
    uniform
        (rankings, heads, B, m) in [0, 1), see :meth:`Estimator.loss`.
    """

    tokens: CachedTokens
    places: Tensor
    target: Target
    uniform: Tensor

    def placed(self, scores: Tensor, heads: slice) -> Tensor:
        """Scores of the tokens of some heads, (heads, t), where the target has the tokens: (heads, B, m), others 0."""
        like = self.target.importance[heads]
        return scores.new_zeros(len(like), like[0].numel()).scatter(1, self.places[heads], scores).view_as(like)


def draw_examples(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the examples of a step, out of ``count``, uniform and with repetition (paper, Algorithm 1)."""
    return torch.randint(count, (batch_size,), generator=generator(seed, "draws", step)).tolist()


def make_batch(examples: Sequence[RankingExample], rankings: int, draws: torch.Generator, device: str) -> Batch:
    """Put examples side by side on the device; ``draws`` makes what ``rankings`` are drawn with."""
    sizes = [example.keys.shape[1] for example in examples]
    heads, width = len(examples[0].keys), max(1, *sizes)

    def filled(name: str) -> Tensor:
        """(heads, B, width)."""
        states = torch.zeros(heads, len(examples), width)
        for place, example in enumerate(examples):
            states[:, place, : sizes[place]] = getattr(example, name)
        return states

    importance, count = filled("importance"), filled("count")
    best = torch.stack([example.best_cost for example in examples], dim=1)
    # Drawn on the CPU, because a GPU's generators draw other numbers.
    uniform = torch.rand(rankings, *importance.shape, generator=draws)

    # Of all examples together the heads know nearly equally many tokens, of each alone they do not: agents, whose
    # products are most of a step, get what is known, and as little else as is needed to give all heads one length.
    known = torch.cat([example.count > 0 for example in examples], dim=1)
    chosen = (~known).byte().argsort(dim=1, stable=True)[:, : int(known.sum(1).max())]
    rows = torch.arange(heads)[:, None]

    def of_chosen(name: str) -> Tensor:
        """(heads, t, ...)."""
        return torch.cat([getattr(example, name) for example in examples], dim=1)[rows, chosen]

    places = torch.cat([place * width + torch.arange(size) for place, size in enumerate(sizes)])
    cache_sizes = torch.tensor([example.cache_size for example in examples], dtype=torch.int32)
    of_tokens = (
        *map(of_chosen, ("keys", "values", "positions")),
        cache_sizes.repeat_interleave(torch.tensor(sizes))[chosen],
    )
    of_target = (importance * count, count, best)
    return Batch(
        CachedTokens(*(_moved(states, device) for states in of_tokens)),
        _moved(places[chosen], device),
        Target(*(_moved(states, device) for states in of_target)),
        _moved(uniform, device),
    )


def read_batches(
    reader: ExampleReader, estimator: Estimator, batch_size: int, seed: int, steps: range, device: str
) -> Iterator[tuple[int, Batch]]:
    """Each of ``steps`` with its batch."""

    def read(step: int) -> Batch:
        drawn = [reader.read(index) for index in draw_examples(len(reader.examples), batch_size, seed, step)]
        draws = generator(seed, "rankings", step, reader.shape.layer_numbers[0])
        return make_batch(drawn, estimator.rankings, draws, device)

    with ThreadPoolExecutor(_AHEAD) as pool:
        ahead = deque(pool.submit(read, step) for step in steps[:_AHEAD])
        try:
            for step in steps:
                if step + _AHEAD in steps:
                    ahead.append(pool.submit(read, step + _AHEAD))
                yield step, ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _moved(states: Tensor, device: str) -> Tensor:
    if torch.device(device).type != "cuda":
        return states.to(device)
    # From pinned memory: several times the speed, and the thread does not wait for it.
    return states.contiguous().pin_memory().to(device, non_blocking=True)
