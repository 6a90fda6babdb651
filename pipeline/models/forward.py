"""One call of a model's own forward: from token ids to its own logits. It knows no eviction and no metric.

Logits come from the model itself, not from its output embedding: some families scale or cap them behind it.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from pipeline.errors import PipelineError


@torch.inference_mode()
def run_model(model: PreTrainedModel, tokens: Tensor, cache: Cache | None, position: int, keep: int) -> Tensor:
    """Append tokens to a cache and return the logits of the last of them.

    Parameters
    ----------
    tokens
        (rows, t) int64, on any device.
    cache
        None for a call without one.
    position
        Position of the first token in its text.
    keep
        How many of the last tokens' logits are wanted, 1 to t.

    Returns
    -------
    (rows, keep, vocabulary), model dtype.

    Raises
    ------
    PipelineError
        A logit is not finite.
    """
    positions = torch.arange(position, position + tokens.shape[1], device=model.device)
    arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": cache is not None, "cache_position": positions}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = keep
    output = model(
        input_ids=tokens.to(model.device), position_ids=positions[None].expand(tokens.shape[0], -1), **arguments
    )
    logits: Tensor = output.logits[:, -keep:]
    require_finite(model, logits, "a logit")
    return logits


def require_finite(model: PreTrainedModel, values: Tensor, what: str) -> None:
    """Refuse numbers that are not finite, before anything is computed from them.

    Raises
    ------
    PipelineError
        Names the model, its dtype and ``what``.
    """
    # One pass; a NaN is the smallest and the largest.
    smallest, largest = torch.aminmax(values)
    if not (torch.isfinite(smallest) and torch.isfinite(largest)):
        dtype = str(model.dtype).removeprefix("torch.")
        raise PipelineError(
            f"{model.name_or_path or type(model).__name__}: {what} is not finite in {dtype}; set models.*.dtype to "
            f"{'float32 or bfloat16' if dtype == 'float16' else 'float32'}, or correct the weights."
        )
