"""What each stage of one model costs. It looks at no data: what they will be like is an assumption of the benchmarks.

Time, disk, memory and tokens are sums over groups of samples of what one sample costs (``counts.py``), at the rates of
a device (``devices.py``).
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.benchmarks.base import SampleGroup
from pipeline.planning.counts import (
    LAYER_KERNELS,
    RANKING_BYTES,
    capture_memory,
    capture_work,
    decoded_bytes,
    evicted_bytes,
    example_bytes,
    policy_bytes,
    score_work,
    step_memory,
    step_work,
)
from pipeline.planning.devices import Device, Work
from pipeline.planning.shapes import ModelShape
from pipeline.policy.agents import AgentParams, PolicyShape
from pipeline.policy.job import LAYERS_PER_UNIT

if TYPE_CHECKING:
    from pipeline.params import Params

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What the train stage keeps of decoded traces for each of its two splits (KVP_CACHE_GB at its default), and how many
# batches it reads ahead.
TRACE_CACHE_BYTES, _READ_AHEAD = 3e9, 5
# How much longer than the mean the longest of an example's heads is, and of those of a step.
_FILLED_UP, _FULLEST = 1.25, 1.1
# A process with torch, transformers and kvpress loaded.
_PROCESS_BYTES = 0.8e9

# The share of max_new_tokens that a row of the sweep generates on average, as measured on the default profile.
GENERATED_SHARE = 0.54
# Seconds until samples can be tokenised, and on one core per thousand tokens of them.
_TOKENIZER_START, _KILOTOKEN = 6, 0.03
# Bytes of compressed Parquet per token of a sample, point of a training curve, cost curve, and rank of a text's token;
# per answer of the sweep, likelihood and token of a text in it; and per judged answer.
_SAMPLE_BYTES, _POINT_BYTES, _COST_CURVE_BYTES, _RANK_BYTES = 1.3, 3.7, 68, 2
_ANSWER_BYTES, _LIKELIHOOD_BYTES, _TEXT_BYTES, _SCORE_BYTES = 5, 4.5, 1, 6

# Tokens of the text that a model is checked on, and bytes of the verdict.
_CHECK_TOKENS, _VERDICT_BYTES = 200, 500


@dataclass(frozen=True)
class StageCost:
    """What one entry of a stage's matrix costs.

    Attributes
    ----------
    seconds
        Wall-clock time, with DVC's copy of the outputs. The executor divides ``units`` over the devices.
    disk
        Bytes of the outputs; DVC's cache holds them once more, unless the file system shares blocks.
    device_memory, host_memory
        Peak bytes; a device that is the host has none of its own.
    forward_tokens
        Tokens that go through the language model.
    flops
        FLOPs of matrix products.
    parts
        The large parts of the peak on the device, bytes.
    commit
        Of the seconds, those in which DVC checksums the outputs and copies them into its cache.
    units
        Into how many parts of equal work the executor can divide it.
    """

    stage: str
    entry: str
    seconds: float
    disk: float
    device_memory: float
    host_memory: float
    forward_tokens: float
    flops: float
    parts: dict[str, float]
    commit: float
    units: int


def policy_shape(shape: ModelShape, agent: AgentParams) -> PolicyShape:
    """The agents of a model."""
    return PolicyShape(shape.ranked_layers, shape.kv_heads, shape.head_dim, agent)


def stage_costs(name: str, shape: ModelShape, params: "Params", device: Device, devices: int) -> Iterator[StageCost]:
    """Every stage of one model of the matrix, in the order of dvc.yaml, on so many ``devices`` of one host."""
    matrix, model = params.matrix, _Model(name, shape, params, device, devices)
    yield model.model()
    yield model.check()
    yield from map(model.samples, matrix.benchmark)
    yield from map(model.traces, matrix.trained_on)
    yield from itertools.starmap(model.train, itertools.product(matrix.trained_on, matrix.estimator))
    yield from map(model.evaluate, matrix.benchmark)
    yield from map(model.score, matrix.benchmark)
    yield from map(model.texts, matrix.trained_on)


@dataclass(frozen=True)
class _Model:
    """One model of the matrix on some devices: what all of its stages share."""

    name: str
    shape: ModelShape
    params: "Params"
    device: Device
    devices: int

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.params.models[self.name].dtype]

    @property
    def weight_bytes(self) -> int:
        return self.shape.parameters * self.item_bytes

    @property
    def policy(self) -> PolicyShape:
        return policy_shape(self.shape, self.params.train.agent)

    @property
    def trained(self) -> int:
        """Policies of our own."""
        return len(self.params.matrix.trained_on) * len(self.params.matrix.estimator)

    @property
    def policies(self) -> int:
        """All that rank: ours, the baselines and the oracle."""
        return self.trained + len(self.params.baselines) + 1

    def captured(self, tokens: int, recorded: float, item_bytes: int = 0) -> Work:
        """Of a run over so many tokens, in the model's dtype unless ``item_bytes`` says another."""
        item_bytes = item_bytes or self.item_bytes
        return self.queued(capture_work(self.shape, tokens, item_bytes, recorded, self.device.accelerator))

    def queued(self, work: Work) -> Work:
        """See :meth:`Work.queued`."""
        return work.queued(self.device, self.params.models[self.name].dtype)

    def groups(self, benchmark: str) -> list[SampleGroup]:
        return self.params.benchmarks[benchmark].samples.expected()

    def count(self, benchmark: str, split: str) -> int:
        """Samples of a split, one at least."""
        counted: int = sum(getattr(group, split) for group in self.groups(benchmark))
        return max(1, counted)

    def cost(
        self,
        stage: str,
        entry: str,
        work: Work,
        disk: float,
        host_memory: float,
        parts: dict[str, float],
        device_memory: float = 0.0,
        forward_tokens: float = 0.0,
        host_seconds: float = 0.0,
        units: int = 1,
        together: bool = False,
    ) -> StageCost:
        """``together``: each of the units takes part in every operation of the work, as agents do in a step."""
        device, dtype = self.device, self.params.models[self.name].dtype
        # The devices that have most to do work off whole units, and a process of each holds what one alone would.
        used = min(self.devices, units)
        rounds = math.ceil(units / used)
        work_share = self.queued(work.shared(1 / units)) * rounds if together else work * (rounds / units)
        host_memory = (host_memory + _PROCESS_BYTES) * used
        return StageCost(
            stage,
            f"{self.name} {entry}".strip(),
            device.start + host_seconds + work_share.seconds(device, dtype) + disk / device.commit,
            disk,
            device_memory if device.accelerator else 0.0,
            host_memory if device.accelerator else host_memory + device_memory,
            forward_tokens,
            work.flops + work.agent_flops,
            parts,
            disk / device.commit,
            units,
        )

    def model(self) -> StageCost:
        # GGUF is dequantised to float32; other weights stay as they are.
        gguf = self.params.model_sources(self.name)["source"].uri.endswith(".gguf")
        disk = self.shape.parameters * (4 if gguf else self.item_bytes)
        return self.cost("model", "", Work(moved=2 * disk), disk, 2 * disk if gguf else 0, {})

    def check(self) -> StageCost:
        # In float32: about ten forwards of a text that exceeds the window where there is one, and the greedy tokens of
        # two decodings.
        tokens = max(_CHECK_TOKENS, self.shape.window)
        work = self.captured(tokens, 1, item_bytes=4) * 10
        work += Work(moved=2 * 16 * 4 * self.shape.parameters)
        parts = capture_memory(self.shape, tokens, 4, 2, self.device.accelerator)
        host = 4 * self.shape.parameters if self.device.accelerator else 0
        return self.cost("check", "", work, _VERDICT_BYTES, host, {**parts}, sum(parts.values()), 10 * tokens)

    def samples(self, benchmark: str) -> StageCost:
        params = self.params.benchmarks[benchmark].samples
        tokens = sum(group.tokens * (group.train + group.validation + group.test) for group in self.groups(benchmark))
        seconds = params.piece_seconds * params.pieces() + _KILOTOKEN * tokens / 1000
        seconds = _TOKENIZER_START + seconds * params.share(self.device.cores * self.devices)
        return self.cost("samples", benchmark, Work(), _SAMPLE_BYTES * tokens, 0, {}, host_seconds=seconds)

    def traces(self, trained_on: str) -> StageCost:
        params, work, tokens = self.params.traces, Work(), 0
        for group in self.groups(trained_on):
            uniform = 1 - params.at_prompt_end
            # The first of so many uniform cuts lies at tokens / (cuts + 1), the mean of its square is 2 / ((cuts + 1)
            # (cuts + 2)) of that of the tokens; where all cuts are at the prompt's end, the continuation is recorded.
            within = 1 - 2 / ((params.cuts * uniform + 1) * (params.cuts * uniform + 2))
            recorded = within + (1 - within) * (1 - (group.context / group.tokens) ** 2)
            for split, share in (("train", recorded), ("validation", 0.75)):
                count = getattr(group, split)
                work += self.captured(group.tokens, share) * count
                work += Work(written=self.trace_bytes(group, split)) * count
                tokens += group.tokens * count
        longest = max(group.tokens for group in self.groups(trained_on))
        parts = capture_memory(self.shape, longest, self.item_bytes, params.cuts, self.device.accelerator)
        # One sequence is written while the next is read.
        parts["cache"] *= 2
        # Weights pass through the host on their way to an accelerator.
        host = self.weight_bytes if self.device.accelerator else 0
        peak, size = sum(parts.values()), params.sequences_per_shard
        units = sum(-(-self.count(trained_on, split) // size) for split in ("train", "validation"))
        return self.cost("traces", trained_on, work, work.written, host, {**parts}, peak, tokens, units=units)

    def cuts(self, group: SampleGroup, split: str) -> tuple[int, float, float]:
        """Examples that a sequence gives, their mean cache size, and the tokens known of each head."""
        params, half = self.params.traces, group.tokens / 2
        if split == "validation":
            return 1, half, half
        mean = params.at_prompt_end * group.context + (1 - params.at_prompt_end) * half
        return params.cuts, mean, mean if params.tokens is None else min(params.tokens, mean)

    def trace_bytes(self, group: SampleGroup, split: str) -> float:
        """Of one sequence, in the files."""
        count, cache_size, known = self.cuts(group, split)
        return count * example_bytes(self.shape, cache_size, known)

    def train(self, trained_on: str, estimator: str) -> StageCost:
        params, policy, groups = self.params.train, self.policy, self.groups(trained_on)
        validations = 1 + -(-params.steps // params.validate_every)
        units = math.ceil(self.shape.ranked_layers / LAYERS_PER_UNIT)
        work, kept = Work(), 0.0
        for split in ("train", "validation"):
            counts = [(group, *self.cuts(group, split), getattr(group, split)) for group in groups]
            examples = sum(cuts * sequences for _, cuts, _, _, sequences in counts)
            # Of the layers of a unit, as everything that lies in memory.
            decoded = sum(
                cuts * sequences * _FILLED_UP * decoded_bytes(self.shape, known) / units
                for _, cuts, _, known, sequences in counts
            )
            fits = min(1.0, TRACE_CACHE_BYTES / decoded)
            kept += fits * decoded
            if split == "train":
                # Drawn at random: what is in memory is hit in proportion, and what was never drawn is never read.
                drawn = params.steps * params.batch_size / examples
                reads = fits * min(1.0, drawn) + (1 - fits) * drawn
            else:
                # Read in turn: a memory that drops the least recently used and lacks one sequence never hits.
                reads = 1.0 if fits == 1.0 else float(validations)
            for group, cuts, _, known, sequences in counts:
                work += Work(read=self.trace_bytes(group, split)) * (sequences * reads)
                if split == "train":
                    made = self.params.estimators[estimator]
                    step = step_work(policy, made, params.batch_size, _FULLEST * known, self.device.accelerator)
                    work += step * (params.steps * cuts * sequences / examples)
                else:
                    work += score_work(policy, known) * (sequences * validations)
        longest = max(self.cuts(group, "train")[2] for group in groups)
        made = self.params.estimators[estimator]
        some = replace(policy, layers=min(LAYERS_PER_UNIT, policy.layers))
        parts = step_memory(some, made, params.batch_size, round(_FULLEST * longest), self.device.accelerator)
        disk = policy_bytes(policy) + _POINT_BYTES * policy.heads * (2 * params.steps + validations)
        host = kept + _READ_AHEAD * params.batch_size * decoded_bytes(self.shape, _FILLED_UP * longest) / units
        entry, peak = f"{trained_on} {estimator}", sum(parts.values())
        return self.cost("train", entry, work, disk, host, {**parts}, peak, units=units, together=True)

    def evaluate(self, benchmark: str) -> StageCost:
        shape, budgets = self.shape, self.params.budgets(benchmark)
        trained, policies = self.trained, self.policies
        rows = policies * len(budgets) + 1  # no eviction
        row_flops = 2 * (shape.layers * shape.layer_weights + shape.vocabulary * shape.hidden)
        work, tokens, disk = Work(), 0.0, 0.0
        peak, parts = 0.0, dict[str, float]()
        for group in self.groups(benchmark):
            evicted = evicted_bytes(
                shape, policies, budgets, group.context, max(group.continuation, group.new_tokens), self.item_bytes
            )
            generated = GENERATED_SHARE * group.new_tokens
            scored = group.continuation * group.scored
            # Policies rank the whole context and its first half.
            ranked = 1.5 * group.context
            decoding = Work(
                flops=row_flops * rows * (scored + generated),
                # A step reads the weights, and the caches of the rows that have not finished.
                moved=group.new_tokens * self.weight_bytes
                + generated * evicted
                + 4 * 4 * rows * scored * shape.vocabulary,
                kernels=(1 + group.new_tokens) * shape.layers * (LAYER_KERNELS + 2 * (len(budgets) + 1)),
            )
            # Caches are gathered, then copied to where there is room for new tokens.
            evicting = Work(moved=RANKING_BYTES * policies * shape.heads * ranked + 4 * evicted)
            # Importance is asked for at the middle and at the end of the context.
            captured = self.captured(group.tokens, 0.75)
            work += (
                captured + score_work(self.policy, ranked) * trained + evicting + self.queued(decoding)
            ) * group.test
            tokens += (group.tokens + rows * (scored + generated)) * group.test
            answer = _ANSWER_BYTES * _answers(group) + _LIKELIHOOD_BYTES * scored + _TEXT_BYTES * generated
            disk += (2 * policies * shape.heads * _COST_CURVE_BYTES + rows * answer) * group.test
            prefill = capture_memory(shape, group.tokens, self.item_bytes, 2, self.device.accelerator)
            stays = prefill["weights"] + prefill["cache"] + prefill["importances"]
            # While a budget's caches get room for new tokens they exist twice.
            twice = policies * min(budgets[-1], group.context) * shape.ranked_numbers * self.item_bytes
            if max(sum(prefill.values()), stays + evicted + twice) > peak:
                peak = max(sum(prefill.values()), stays + evicted + twice)
                parts = {**prefill, f"evicted caches of {rows} rows": evicted}
        host = self.weight_bytes if self.device.accelerator else 0
        units = self.count(benchmark, "test")
        return self.cost("evaluate", benchmark, work, disk, host, parts, peak, tokens, units=units)

    def score(self, benchmark: str) -> StageCost:
        # A moment, whatever there is to judge.
        answers = sum(_answers(group) * group.test for group in self.groups(benchmark))
        rows = self.policies * len(self.params.budgets(benchmark)) + 1
        return self.cost("score", benchmark, Work(), _SCORE_BYTES * rows * answers, 0, {})

    def texts(self, benchmark: str) -> StageCost:
        count = len(self.params.texts.tasks.get(benchmark, ("the first",)))
        group = self.groups(benchmark)[0]
        parts = capture_memory(self.shape, group.tokens, self.item_bytes, 2, self.device.accelerator)
        work = self.captured(group.tokens, 0.75)
        work += score_work(self.policy, 1.5 * group.context) * self.trained
        disk = count * self.policies * self.shape.heads * group.context * _RANK_BYTES
        host = self.weight_bytes if self.device.accelerator else 0
        tokens = count * group.tokens
        return self.cost("texts", benchmark, work * count, disk, host, {**parts}, sum(parts.values()), tokens)


def _answers(group: SampleGroup) -> int:
    """Answers of each row of the sweep to one sample: a text, likelihoods, or both."""
    return group.scored + (group.new_tokens > 0)
