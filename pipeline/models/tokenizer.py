"""Load the tokenizer of an exported model; samples are made with nothing else of it."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.errors import PipelineError, one_line


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers and transformers share no base class
        raise PipelineError(
            f"{directory} holds no readable tokenizer ({one_line(error)}); rebuild the model."
        ) from error
    return tokenizer
