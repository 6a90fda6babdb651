"""What benchmarks of composed dialogues share: all about as long, the last reply to be predicted."""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, TypeVar

from pipeline.benchmarks.base import AllSizes, Answer, Benchmark, Making, SampleGroup
from pipeline.errors import PipelineError
from pipeline.executor.place import threads
from pipeline.samples.sample import SPLITS, Sample, Split
from pipeline.section import PositiveInt

Candidate = TypeVar("Candidate")
Result = TypeVar("Result")
# Share of the time in which a thread keeps the others waiting, on two cores.
_SERIAL = 0.15
# Candidates of each thread before it is looked whether there are enough.
_PER_THREAD = 8


class ComposedDialogues(Benchmark):
    """Dialogues composed to ``length`` tokens, the last reply, of ``max_reply_tokens`` at most, to be predicted."""

    trainable: ClassVar[bool] = True
    assumed: ClassVar[str] = "all of them full"
    too_few: ClassVar[str]
    """What is said where a source does not suffice, with ``{found}``, ``{wanted}``, ``{split}`` and ``{length}``."""

    length: PositiveInt
    max_reply_tokens: PositiveInt
    sizes: AllSizes

    @property
    def tokens(self) -> int:
        """The length that dialogues are composed to."""
        return self.length

    def share(self, cores: int) -> float:
        """All but what the tokenizer lets no other thread do."""
        return _SERIAL + (1 - _SERIAL) / cores

    def expected(self) -> list[SampleGroup]:
        """Full dialogues, with replies of half the most that they may have."""
        reply = self.max_reply_tokens // 2
        return [self._group(self.length - reply, reply)]

    def score(self, sample: Sample, answer: Answer) -> dict[str, float]:
        """Nothing is written or chosen."""
        return {}

    def divided(
        self,
        making: Making,
        candidates: Sequence[Candidate],
        split_of: Callable[[Candidate], Split],
        compose: Callable[[Split, Sequence[Candidate], Candidate], Sample | None],
    ) -> dict[Split, list[Sample]]:
        """Of each split's candidates, in an order that the seed decides, the first that can be composed.

        ``compose`` makes a sample of a split from all of its candidates and the one whose last reply is to be
        predicted.

        Raises
        ------
        PipelineError
            There are too few.
        """
        samples: dict[Split, list[Sample]] = {}
        for split in SPLITS:
            own = [candidate for candidate in candidates if split_of(candidate) == split]
            random.Random(f"{self.seed} {split}").shuffle(own)
            wanted = self.sizes.of(split)
            samples[split] = _first(wanted, own, functools.partial(compose, split, own))
            if (found := len(samples[split])) < wanted:
                told = self.too_few.format(found=found, wanted=wanted, split=split, length=self.length)
                raise PipelineError(f"benchmarks.{making.name}: {told}")
            making.progress(1, split)
        return samples


def in_threads(of: Callable[[Candidate], Result], candidates: Sequence[Candidate]) -> Iterator[Result]:
    """What is found of each candidate; nearly all of the time goes into the tokenizer, which lets other threads run."""
    with ThreadPoolExecutor(threads()) as pool:
        yield from pool.map(of, candidates)


def _first(wanted: int, candidates: Sequence[Candidate], compose: Callable[[Candidate], Sample | None]) -> list[Sample]:
    """The first so many samples that can be made, in the order of their candidates; fewer where there are no more."""
    samples: list[Sample] = []
    step = threads() * _PER_THREAD
    for start in range(0, len(candidates), step):
        for sample in in_threads(compose, candidates[start : start + step]):
            if sample is not None:
                samples.append(sample)
            if len(samples) == wanted:
                return samples
    return samples
