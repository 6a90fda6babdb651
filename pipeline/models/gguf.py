"""A SentencePiece vocabulary in a GGUF file, as a fast tokenizer. It knows no weights.

GGUF calls such a vocabulary ``llama``: pieces with scores, to be read as SentencePiece's BPE reads them. Of
all neighbours whose union is a piece, the two with the highest-scoring union are merged, the leftmost of
equals first, until none are left; what is no piece becomes bytes. Transformers 5.2 reads Gemma's as a unigram
model instead, which splits text into far more tokens than the model was trained on.
"""

from typing import Any

from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges


def sentencepiece_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast | None:
    """Rebuild the tokenizer of a GGUF file, opened, from its pieces, their scores and their types.

    Returns
    -------
    The tokenizer, with the file's special tokens, chat template and beginning-of-sequence token; None for a file
    whose vocabulary is not SentencePiece's.

    Notes
    -----
    User-defined pieces (in Gemma's vocabulary runs of spaces and line breaks, and HTML tags) are cut out of a text
    before anything is merged, the longest first, as SentencePiece does. Control tokens are recognised in a text,
    as in every fast tokenizer.
    """
    fields = reader.fields

    def read(name: str, default: Any = None) -> Any:
        return fields[name].contents() if name in fields else default

    if read("tokenizer.ggml.model") != "llama":
        return None
    pieces: list[str] = read("tokenizer.ggml.tokens")
    scores, types = read("tokenizer.ggml.scores"), read("tokenizer.ggml.token_type")
    # What llama.cpp assumes of a SentencePiece vocabulary that does not say.
    prefix, bos, eos = (
        read(f"tokenizer.ggml.{name}", default)
        for name, default in (("add_space_prefix", True), ("add_bos_token", True), ("add_eos_token", False))
    )
    special = {
        f"{name}_token": pieces[index]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (index := read(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    ids = {piece: index for index, piece in enumerate(pieces)}
    mergeable = {piece: ids[piece] for piece, kind in zip(pieces, types, strict=True) if kind == TokenType.NORMAL}
    merges = generate_merges(mergeable, {piece: scores[index] for piece, index in mergeable.items()})

    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token=special.get("unk_token"), fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    for kinds, add in (
        ((TokenType.CONTROL, TokenType.UNKNOWN), tokenizer.add_special_tokens),
        ((TokenType.USER_DEFINED,), tokenizer.add_tokens),
    ):
        add([AddedToken(piece, normalized=False) for piece, kind in zip(pieces, types, strict=True) if kind in kinds])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        add_bos_token=bos,
        add_eos_token=eos,
        chat_template=read("tokenizer.chat_template"),
        **special,
    )
