"""Talk to a model whose cache a policy keeps to a budget, however long the dialogue gets."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from stages import _paths
from stages._app import DeviceOption, ModelOption, check_device, limit_threads, run


def main(
    model: ModelOption,
    policy: Annotated[Path, typer.Option(help="Directory of a policy that was trained for the model.")],
    budget: Annotated[int, typer.Option(help="Tokens that each head keeps.", min=1)] = 512,
    slack: Annotated[int, typer.Option(help="Tokens above the budget until all are ranked again.", min=0)] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Longest reply.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="Of draws; below 0.001 nothing is drawn.", min=0, max=10)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0, max=2**63 - 1)] = 0,
    device: DeviceOption = "cpu",
) -> None:
    """Read a line, stream the reply of MODEL, and say what the cache holds; an empty line or Ctrl-D ends it."""
    import torch
    from transformers import TextStreamer

    from pipeline.errors import PipelineError
    from pipeline.eviction.cache import KVPCache
    from pipeline.models.load import end_token_ids, load_model
    from pipeline.models.params import read_dtype
    from pipeline.models.tokenizer import load_tokenizer
    from pipeline.policy.agents import load_policy
    from pipeline.samples.conversation import Conversation

    check_device(device)
    dtype = read_dtype(model)
    agents, _ = load_policy(policy, model)
    limit_threads()
    # Neither generate nor the streamer are typed.
    tokenizer: Any = load_tokenizer(_paths.model(model))
    language_model: Any = load_model(_paths.model(model), dtype, device)
    cache = KVPCache(agents, budget, slack=slack, model=language_model)
    ends = end_token_ids(language_model)
    conversation = Conversation(tokenizer, ends)
    room = getattr(language_model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    torch.manual_seed(seed)
    drawing = {"do_sample": True, "temperature": temperature} if temperature >= 0.001 else {"do_sample": False}
    while line := _next_line():
        try:
            conversation.ask(line)
        except PipelineError as error:
            typer.echo(f"error: {error}", err=True)
            continue
        if len(conversation.ids) + max_new_tokens > room:
            raise PipelineError(
                f"The dialogue has {len(conversation.ids):,} tokens, which with a reply of {max_new_tokens:,} "
                f"(--max-new-tokens) are more than the {room:,} positions that {model} knows; begin a new one."
            )
        ids = torch.tensor([conversation.ids], device=language_model.device)
        written = language_model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=min(ends, default=0),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **drawing,
        )
        conversation.reply(written[0, ids.shape[1] :].tolist())
        typer.echo(
            f"[{cache.held:,} of {cache.get_seq_length():,} tokens in the cache of each head, {cache.nbytes / 1e6:.1f} "
            f"MB; without eviction {cache.nbytes_of_all / 1e6:.1f} MB]",
            err=True,
        )


def _next_line() -> str:
    """What the user says; nothing at the end of the input."""
    if sys.stdin.isatty():
        typer.echo("> ", nl=False, err=True)
    # Bytes that are no UTF-8 come as halves of characters, which no tokenizer takes.
    return sys.stdin.readline().encode(errors="replace").decode().strip()


if __name__ == "__main__":
    run(main)
