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
    """B examples with m tokens each, for all heads; those with fewer are filled up.

    Attributes
    ----------
    tokens
        (heads, B * m) of them: agents see no difference between examples.
    target
        (heads, B, m).
    uniform
        (rankings, heads, B, m) in [0, 1), see :meth:`Estimator.loss`.
    """

    tokens: CachedTokens
    target: Target
    uniform: Tensor


def draw_examples(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indices of the examples of a step, out of ``count``, uniform and with repetition (paper, Algorithm 1)."""
    return torch.randint(count, (batch_size,), generator=generator(seed, "draws", step)).tolist()


def make_batch(examples: Sequence[RankingExample], rankings: int, draws: torch.Generator, device: str) -> Batch:
    """Bring examples to one length and to the device; ``draws`` makes what ``rankings`` are drawn with."""
    width = max(1, *(example.keys.shape[1] for example in examples))

    def together(name: str) -> Tensor:
        """(heads, B, width, ...)."""
        found: list[Tensor] = [getattr(example, name) for example in examples]
        filled = found[0].new_zeros(found[0].shape[0], len(found), width, *found[0].shape[2:])
        for place, states in enumerate(found):
            filled[:, place, : states.shape[1]] = states
        return filled

    keys, values, positions, importance, count = map(together, ("keys", "values", "positions", "importance", "count"))
    sizes = torch.tensor([example.cache_size for example in examples], dtype=torch.int32).repeat_interleave(width)
    best = torch.stack([example.best_cost for example in examples], dim=1)
    # Drawn on the CPU, because a GPU's generators draw other numbers.
    uniform = torch.rand(rankings, *importance.shape, generator=draws)
    flat = (states.flatten(1, 2) for states in (keys, values, positions))
    tokens = CachedTokens(*(_moved(states, device) for states in (*flat, sizes[None])))
    target = Target(*(_moved(states, device) for states in (importance * count, count, best)))
    return Batch(tokens, target, _moved(uniform, device))


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
