"""Train all agents of a model from stored traces (paper, Algorithm 1). The language model is never run.

Each step draws some examples (``pipeline/policy/batches.py``), scores their tokens with every agent, and follows the
gradient of its estimator (``pipeline/policy/estimators``). This file knows no MLflow: curves go to Parquet.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.files import atomic_write
from pipeline.policy.agents import AgentParams, Policy, PolicyShape, run_agents, save_policy
from pipeline.policy.batches import Batch, read_batches
from pipeline.policy.estimators.base import Estimator
from pipeline.policy.inputs.base import CachedTokens
from pipeline.policy.progress import CHECKPOINT_FILE, Curves, resume, save_checkpoint
from pipeline.policy.ranking import rank, total_cost
from pipeline.section import PositiveInt, Section, Seed
from pipeline.traces.draws import generator
from pipeline.traces.shards import ExampleReader, remove_unfinished

CURVES_FILE = "curves.parquet"
# Statistics of keys and values need no more than this many, taken evenly: samples may be sorted by task.
NORMALISATION_EXAMPLES = 64


class TrainParams(Section):
    """Training of all agents of a model (paper, Algorithm 1)."""

    agent: AgentParams
    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: Annotated[float, Field(gt=0)]
    final_learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    warmup_factor: Annotated[float, Field(gt=0, le=1)]
    gradient_clip: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    validate_every: PositiveInt
    checkpoint_every: PositiveInt
    seed: Seed


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
    reader: ExampleReader,
    validation: ExampleReader,
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
        Traces or the checkpoint are damaged, or the training diverges.
    """
    trace = reader.shape
    shape = PolicyShape(trace.layers, trace.kv_heads, trace.head_dim, params.agent)
    policy = Policy(shape, generator(params.seed, "weights", trace.layer_numbers[0])).to(device)
    _normalise(policy, reader)
    # Fused: one pass over parameters, gradients and moments instead of one for each operation.
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay, fused=True
    )
    curves = Curves(shape, trace.layer_numbers)
    done = resume(work, policy, optimizer, curves)
    advance(done, "resumed" if done else "starting")
    steps = range(done, params.steps)
    for step, batch in read_batches(reader, estimator, params.batch_size, params.seed, steps, device):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, params)
        loss, norms = compute_gradients(policy, batch, estimator, params.gradient_clip)
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
    _, _, held_out = next(point for point in reversed(curves.points) if point[1] == "validation_cost")
    save_policy(work, policy, config | {"held_out_cost": [round(float(cost), 4) for cost in held_out]})
    (work / CHECKPOINT_FILE).unlink(missing_ok=True)
    remove_unfinished(work)


def compute_gradients(
    policy: Policy, batch: Batch, estimator: Estimator, limit: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Put each agent's gradient, clipped to norm ``limit``, into the parameters' ``grad``.

    Agents share nothing, so blocks of them go forward and backward in turn (``Policy.blocks``).

    Returns
    -------
    losses
        (heads,), means over the examples.
    norms
        (heads,), of the gradients before they were clipped.
    """
    parameters = [*policy.weights, *policy.biases]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
    losses, norms = [], []
    for heads in policy.blocks(batch.tokens.keys.shape[1]):
        leaves = [parameter.detach()[heads].requires_grad_() for parameter in parameters]
        weights, biases = leaves[: len(policy.weights)], leaves[len(policy.weights) :]
        target = batch.target[heads]
        scores = batch.placed(run_agents(weights, biases, policy.inputs(batch.tokens[heads], heads)), heads)
        loss = estimator.loss(scores, target, batch.uniform[:, heads]).mean(-1)
        # The gradient of the sum is each agent's own gradient.
        gradients = torch.autograd.grad(loss.sum(), leaves)
        # As long as they are in a processor's cache: over all agents, each pass reads them from memory.
        norms.append(clip_gradients(gradients, limit))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad[heads] = gradient
        losses.append(loss.detach())
    return torch.cat(losses), torch.cat(norms)


@torch.no_grad()
def clip_gradients(gradients: Sequence[Tensor], limit: float) -> Tensor:
    """Clip each agent's gradient, of (heads, rows, columns) each, to norm ``limit``; returns the norms before."""
    norms: Tensor = torch.stack([gradient.norm(dim=(1, 2)) for gradient in gradients]).norm(dim=0)
    factor = (limit / (norms + 1e-6)).clamp(max=1.0)[:, None, None]
    for gradient in gradients:
        gradient.mul_(factor)
    return norms


@torch.no_grad()
def validation_cost(policy: Policy, reader: ExampleReader, device: str) -> Tensor:
    """Normalised cost of the policy's ranking of held-out examples, all tokens, (heads,); 1.0 = best order.

    A head whose scores are not all finite costs NaN.
    """
    costs = []
    for example in map(reader.read, range(len(reader.examples))):
        scores = policy(example.keys.to(device), example.values.to(device))
        cost = total_cost(example.importance.to(device), rank(scores)) / example.best_cost.to(device)
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


@torch.no_grad()
def _normalise(policy: Policy, reader: ExampleReader) -> None:
    if not policy.shape.channels:
        return
    available = len(reader.examples)
    taken = min(NORMALISATION_EXAMPLES, available)
    total, squares, tokens = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for example in (reader.read(place * available // taken) for place in range(taken)):
        size = torch.tensor([[example.cache_size]])
        states = policy.states(CachedTokens(example.keys, example.values, example.positions, size)).double()
        count = example.count.double()[..., None]  # (heads, m, 1) beside (heads, m, channels)
        total = total + (count * states).sum(1, keepdim=True)
        squares = squares + (count * states.square()).sum(1, keepdim=True)
        tokens = tokens + count.sum(1, keepdim=True)
    tokens = tokens.clamp_min(1)  # of a head no token may be known
    mean = total / tokens
    deviation = (squares / tokens - mean.square()).clamp_min(1e-12).sqrt()
    policy.mean.copy_(mean.float())
    policy.std.copy_(deviation.clamp_min(1e-4).float())


def describe(params: TrainParams, reader: ExampleReader, estimator: Estimator) -> dict[str, Any]:
    """Provenance of a training for the policy's config.json."""
    return {
        "estimator": estimator.name,
        "model": reader.shape.model,
        "trained_on": reader.shape.benchmark,
        "params": params.model_dump(mode="json"),
        "trace_shape": asdict(reader.shape),
        "training_sequences": reader.sequences,
        "training_examples": len(reader.examples),
    }
