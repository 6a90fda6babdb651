"""Train all agents of a model from stored traces (paper, Algorithm 1). The language model is never run.

Each step draws a sequence and a cache size, scores its tokens with every agent, and follows the gradient
of its estimator (``pipeline/policy/estimators``). Every draw depends on (seed, step) only, so
a run resumed from a checkpoint ends with the same bytes. This file knows no MLflow: curves go to Parquet.
"""

import functools
import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.files import atomic_write
from pipeline.policy.agents import AgentParams, Policy, PolicyShape, run_agents, save_policy
from pipeline.policy.estimators.base import Estimator
from pipeline.policy.progress import CHECKPOINT_FILE, Curves, resume, save_checkpoint
from pipeline.policy.ranking import optimal_total_cost, rank, total_cost
from pipeline.section import PositiveInt, Section, Seed
from pipeline.traces.importance import future_importance
from pipeline.traces.shards import TraceReader, remove_unfinished

CURVES_FILE = "curves.parquet"
# Statistics of keys and values need no more than this many, taken evenly: samples may be sorted by task.
NORMALISATION_SEQUENCES = 32


class TrainParams(Section):
    """Training of all agents of a model (paper, Algorithm 1)."""

    agent: AgentParams
    steps: PositiveInt
    learning_rate: Annotated[float, Field(gt=0)]
    final_learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    warmup_factor: Annotated[float, Field(gt=0, le=1)]
    gradient_clip: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    validate_every: PositiveInt
    checkpoint_every: PositiveInt
    seed: Seed


@dataclass(frozen=True)
class Draw:
    """What one training step looks at: a sequence and how much of it is the cache."""

    sequence: int
    cache_size: int


def learning_rate(step: int, params: TrainParams) -> float:
    """Linear warm-up from ``warmup_factor``, then cosine to ``final_learning_rate`` (paper, section "Training")."""
    if step < params.warmup_steps:
        progress = step / params.warmup_steps
        return params.learning_rate * (params.warmup_factor + (1 - params.warmup_factor) * progress)
    progress = (step - params.warmup_steps) / max(1, params.steps - params.warmup_steps)
    amplitude = params.learning_rate - params.final_learning_rate
    return params.final_learning_rate + 0.5 * amplitude * (1 + math.cos(math.pi * progress))


def train_policy(
    work: Path,
    reader: TraceReader,
    validation: TraceReader,
    estimator: Estimator,
    params: TrainParams,
    config: dict[str, Any],
    device: str,
    advance: Callable[[int, str], None],
) -> None:
    """Train, checkpointing into ``work``, and leave there the policy, its config and its curves.

    Parameters
    ----------
    work
        Directory that survives an interruption; training continues from its checkpoint.
    reader, validation
        Traces to learn from, and held-out traces for ``validation_cost``.
    config
        Provenance for the policy's config.json.
    advance
        Called after each step (and once for the steps found done) with the count and a short status.

    Raises
    ------
    PipelineError
        The traces are too short for a single block, the checkpoint is damaged, or the training diverges.
    """
    trace = reader.shape
    shape = PolicyShape(trace.layers, trace.kv_heads, trace.head_dim, params.agent)
    for source in (reader, validation):
        shortest = min(source.sequences, key=lambda sequence: sequence.tokens)
        if shortest.tokens <= trace.block_size:
            raise PipelineError(
                f"{source.root}: sample {shortest.sample_id} has {shortest.tokens} tokens, not more than "
                f"traces.block_size = {trace.block_size}; lower the block size or use longer samples."
            )
    policy = Policy(shape, _generator(params.seed, "weights")).to(device)
    _normalise(policy, reader)
    # Fused: one pass over parameters, gradients and moments instead of one for each operation.
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
    )
    curves = Curves(shape, trace.layer_numbers)
    done = resume(work, policy, optimizer, curves)
    advance(done, "resumed" if done else "starting")
    for step, (keys, values, importance, uniform) in _prefetch(reader, estimator, params, done, device):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, params)
        loss = compute_gradients(policy, keys, values, functools.partial(_loss, estimator, importance, uniform))
        norms = clip_gradients(policy, params.gradient_clip)
        optimizer.step()
        curves.add(step, "loss", loss)
        curves.add(step, "gradient_norm", norms)
        status = ""
        if (step + 1) % params.validate_every == 0 or step + 1 == params.steps or step == 0:
            cost = validation_cost(policy, validation, device)
            _check_finite(step, estimator, params, loss, norms, cost)
            curves.add(step, "validation_cost", cost)
            status = f"validation cost {cost.mean():.3f}"
        if (step + 1) % params.checkpoint_every == 0 and step + 1 < params.steps:
            save_checkpoint(work, policy, optimizer, curves, step + 1)
        advance(1, status)
    with atomic_write(work / CURVES_FILE) as temporary:
        curves.table().write_parquet(temporary)
    save_policy(work, policy, config)
    (work / CHECKPOINT_FILE).unlink(missing_ok=True)
    remove_unfinished(work)


def _loss(estimator: Estimator, importance: Tensor, uniform: Tensor, scores: Tensor, heads: slice) -> Tensor:
    """The losses of some heads of a step."""
    return estimator.loss(scores, importance[heads], uniform[:, heads])


def draw_uniform(estimator: Estimator, params: TrainParams, step: int, heads: int, tokens: int) -> Tensor:
    """What the rankings of a step are made of: (rankings, heads, tokens) in [0, 1).

    It depends on seed and step only. Drawn on the CPU, because a GPU's generators draw other numbers.
    """
    return torch.rand(estimator.rankings, heads, tokens, generator=_generator(params.seed, "rankings", step))


def compute_gradients(
    policy: Policy, keys: Tensor, values: Tensor, loss_of: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """Put each agent's gradient into the parameters' ``grad``; returns the losses, (heads,).

    Agents share nothing, so blocks of them go forward and backward in turn (``Policy.blocks``). ``keys`` and ``values``
    are (heads, n, head_dim), of any floating dtype.
    """
    parameters = [*policy.weights, *policy.biases]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
    losses = []
    for heads in policy.blocks(keys.shape[1]):
        leaves = [parameter.detach()[heads].requires_grad_() for parameter in parameters]
        weights, biases = leaves[: len(policy.weights)], leaves[len(policy.weights) :]
        loss = loss_of(run_agents(weights, biases, policy.inputs(keys[heads], values[heads], heads)), heads)
        # The gradient of the sum is each agent's own gradient.
        gradients = torch.autograd.grad(loss.sum(), leaves)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad[heads] = gradient
        losses.append(loss.detach())
    return torch.cat(losses)


@torch.no_grad()
def clip_gradients(policy: Policy, limit: float) -> Tensor:
    """Clip each agent's gradient to norm ``limit``; returns the norms before, (heads,)."""
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    norms = torch.stack([gradient.square().sum(dim=(1, 2)) for gradient in gradients]).sum(0).sqrt()
    factor = (limit / (norms + 1e-6)).clamp(max=1.0)[:, None, None]
    for gradient in gradients:
        gradient.mul_(factor)
    return norms


@torch.no_grad()
def validation_cost(policy: Policy, reader: TraceReader, device: str) -> Tensor:
    """Normalised cost of the policy's ranking on held-out sequences, (heads,); 1.0 = best order.

    Each sequence is cut once, in its middle: the cache is its first half, the importance comes from its
    second half. A head whose scores are not all finite costs NaN.
    """
    block = reader.shape.block_size
    costs = []
    for index, sequence in enumerate(reader.sequences):
        keys, values, record = reader.read(index)
        cache_size = max(1, sequence.tokens // 2 // block) * block
        importance = _importance(record, cache_size, block, device)
        scores = policy(keys[:, :cache_size].to(device), values[:, :cache_size].to(device))
        cost = total_cost(importance, rank(scores)) / optimal_total_cost(importance)
        # A ranking exists of any scores. Without a look at each of them, which would wait for the device each time:
        costs.append(torch.where(scores.isfinite().all(-1), cost, torch.nan))
    return torch.stack(costs).mean(0)


def _check_finite(step: int, estimator: Estimator, params: TrainParams, *values: Tensor) -> None:
    """Stop a training that has diverged: ``values`` are (heads,) each. It waits for the device."""
    finite = torch.stack([value.isfinite() for value in values]).all(0)
    if not finite.all():
        raise PipelineError(
            f"The training with {estimator.name} has diverged: at step {step + 1} the scores, losses or gradients of "
            f"{int((~finite).sum())} of {len(finite)} heads are not finite; lower train.learning_rate "
            f"({params.learning_rate:g}) in params.yaml."
        )


def _importance(record: Tensor, cache_size: int, block_size: int, device: str) -> Tensor:
    # A token nobody looks at again may round to 0 in float16; the floor keeps the normaliser above 0.
    return future_importance(record, cache_size, block_size).clamp_min(1e-10).to(device)


@torch.no_grad()
def _normalise(policy: Policy, reader: TraceReader) -> None:
    if not policy.shape.channels:
        return
    available = len(reader.sequences)
    count = min(NORMALISATION_SEQUENCES, available)
    total, squares, tokens = torch.zeros(()), torch.zeros(()), 0
    for sequence in (place * available // count for place in range(count)):
        keys, values, _ = reader.read(sequence)
        states = policy.states(keys, values).double()  # (heads, n, channels)
        total = total + states.sum(1, keepdim=True)
        squares = squares + states.square().sum(1, keepdim=True)
        tokens += states.shape[1]
    mean = total / tokens
    deviation = (squares / tokens - mean.square()).clamp_min(1e-12).sqrt()
    policy.mean.copy_(mean.float())
    policy.std.copy_(deviation.clamp_min(1e-4).float())


def _generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    # Hashed, because torch's CPU generator looks at the low 32 bits of a seed only.
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4]))


def draw_cut(reader: TraceReader, params: TrainParams, step: int) -> Draw:
    """What a step trains on: a sequence and a cache size, both uniform, decided by the seed and the step alone."""
    generator = _generator(params.seed, "draws", step)
    sequence = int(torch.randint(len(reader.sequences), (), generator=generator))
    block = reader.shape.block_size
    # Cache sizes are multiples of the block size with at least one token of future.
    largest = (reader.sequences[sequence].tokens - 1) // block
    return Draw(sequence, block * (1 + int(torch.randint(largest, (), generator=generator))))


def _prefetch(
    reader: TraceReader, estimator: Estimator, params: TrainParams, first: int, device: str
) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor, Tensor]]]:
    # One thread reads and draws ahead, so that a step waits neither for the disk nor for the way to the device.
    queue: Queue[tuple[int, tuple[Tensor, Tensor, Tensor, Tensor]] | Exception] = Queue(maxsize=4)
    stop = threading.Event()

    def produce() -> None:
        try:
            for step in range(first, params.steps):
                draw = draw_cut(reader, params, step)
                keys, values, record = reader.read(draw.sequence)
                importance = _importance(record, draw.cache_size, reader.shape.block_size, device)
                keys, values = (_moved(states[:, : draw.cache_size], device) for states in (keys, values))
                uniform = _moved(draw_uniform(estimator, params, step, *importance.shape), device)
                item = (step, (keys, values, importance, uniform))
                if stop.is_set():
                    return
                queue.put(item)
        except Exception as error:  # handed to the consumer, which raises it
            queue.put(error)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        for _ in range(first, params.steps):
            item = queue.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stop.set()
        while thread.is_alive():
            while not queue.empty():
                queue.get_nowait()
            thread.join(timeout=0.05)


def _moved(states: Tensor, device: str) -> Tensor:
    if torch.device(device).type != "cuda":
        return states.to(device)
    # From pinned memory: several times the speed, and the thread does not wait for it.
    return states.contiguous().pin_memory().to(device, non_blocking=True)


def describe(params: TrainParams, reader: TraceReader, estimator: Estimator) -> dict[str, Any]:
    """Provenance of a training for the policy's config.json."""
    return {
        "estimator": estimator.name,
        "model": reader.shape.model,
        "trained_on": reader.shape.benchmark,
        "params": params.model_dump(mode="json"),
        "trace_shape": asdict(reader.shape),
        "training_sequences": len(reader.sequences),
    }
