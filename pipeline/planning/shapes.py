"""Sizes of a language model, from its config.json or from a table of the profiles' models. It loads no weights."""

import re
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from pipeline.errors import PipelineError
from pipeline.models.layers import full_attention_layers
from pipeline.sources.pins import SourceParams


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with grouped-query attention and a gated MLP (Llama, Qwen, Phi-3, Gemma and their like).

    Attributes
    ----------
    layers, ranked_layers
        All layers, and those that attend to the whole context (``pipeline/models/layers.py``).
    window
        Tokens that the other layers see.
    """

    layers: int
    ranked_layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    tied_embeddings: bool = False
    window: int = 0

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices: query, key, value, output, gate, up, down."""
        attention = 2 * self.hidden * self.head_dim * (self.query_heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """Parameters of embeddings and layers, but for biases and norms, which are less than a thousandth."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied_embeddings else 2)
        return embeddings + self.layers * self.layer_weights

    @property
    def heads(self) -> int:
        """KV heads of the ranked layers, so agents of a policy."""
        return self.ranked_layers * self.kv_heads

    @property
    def ranked_numbers(self) -> int:
        """Numbers that one token adds to the keys and values of the ranked layers."""
        return 2 * self.heads * self.head_dim


# Shapes of the profiles' models, for before they are fetched, by the last part of their source.
SHAPES = {
    "SmolLM2-135M-Instruct": ModelShape(30, 30, 9, 3, 64, 576, 1536, 49152, tied_embeddings=True),
    "Qwen2.5-7B-Instruct": ModelShape(28, 28, 28, 4, 128, 3584, 18944, 152064),
    "phi-4": ModelShape(40, 40, 40, 10, 128, 5120, 17920, 100352),
    "gemma-3-270m": ModelShape(18, 3, 4, 1, 256, 640, 2048, 262144, tied_embeddings=True, window=512),
}


def model_shape(name: str, source: SourceParams, models: Path) -> tuple[ModelShape, str]:
    """The shape of a model, and where it is known from.

    Parameters
    ----------
    source
        What the model is made from.
    models
        Where the model stage writes.

    Raises
    ------
    PipelineError
        The model has not been fetched and is none of :data:`SHAPES`, or its config.json is none of a decoder.
    """
    path = models / name / "config.json"
    if not path.is_file():
        # hub:owner/name, or a file name that ends in the kind of quantisation
        published = re.sub(r"[.-]q\d\w*\.gguf$", "", re.split("[/:]", source.uri)[-1], flags=re.IGNORECASE)
        if published in SHAPES:
            return SHAPES[published], f"the published sizes of {published}"
        raise PipelineError(
            f"{path} does not exist, and of models not yet fetched only the sizes of {', '.join(SHAPES)} are known; "
            f"run the model stage for {name} first."
        )
    try:
        whole = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
        config = whole.get_text_config(decoder=True)
        shape = ModelShape(
            config.num_hidden_layers,
            len(full_attention_layers(config)),
            config.num_attention_heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            config.hidden_size,
            config.intermediate_size,
            config.vocab_size,
            config.tie_word_embeddings,
            getattr(config, "sliding_window", None) or 0,
        )
    except Exception as error:  # transformers raises bare built-in types for unreadable files
        reason = " ".join(str(error).split())[:200]
        raise PipelineError(
            f"{path} does not give the sizes of a decoder ({reason}); run the model stage again."
        ) from None
    return shape, str(path)
