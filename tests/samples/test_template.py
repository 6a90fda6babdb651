"""Chat templates: the same prompt on any day, a direct answer where the template would write it, or one sentence."""

import datetime as clocks
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from pipeline.errors import PipelineError
from pipeline.models.tokenizer import load_tokenizer
from pipeline.samples.template import chat_prompt, encode_reply, end_of_turn, reply_gap, template_settings
from tests.samples import tokenizers as tiny

TURNS = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And snow?"},
]
# template -> what stands behind the last turn's text, the gap before a reply, and what is recorded.
KNOWN = {
    "CHATML": ("<|im_end|>\n<|im_start|>assistant\n", "", {}),
    "QWEN3": ("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "", {"thinking": "off"}),
    "SMOLLM3": (
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n",
        "",
        {"date": "2024-07-26", "thinking": "off"},
    ),
    "LLAMA32": ("<|eot_id|><|im_start|>assistant\n\n", "", {"date": "2024-07-26"}),
    "GEMMA": ("<|im_end|>\n<|im_start|>model\n", "", {}),
    "MISTRAL": (" [/INST]", " ", {}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_reply_stands_where_the_template_writes_it(name: str) -> None:
    header, gap, recorded = KNOWN[name]
    tokenizer = tiny.byte_tokenizer(getattr(tiny, name))
    prompt = chat_prompt(tokenizer, TURNS)
    assert prompt.endswith(f"And snow?{header}")
    assert reply_gap(tokenizer) == gap
    assert template_settings(tokenizer) == recorded
    ids, prompt_len = encode_reply(tokenizer, TURNS, "No.", None)
    assert tokenizer.decode(ids[:prompt_len]) == prompt
    assert tokenizer.decode(ids[prompt_len:]) == f"{gap}No."
    # What the template itself makes of the finished turn, told the same.
    told = {"enable_thinking": False, "date_string": "26 Jul 2024", "strftime_now": lambda _: "26 July 2024"}
    finished = tokenizer.apply_chat_template([*TURNS, {"role": "assistant", "content": "No."}], tokenize=False, **told)
    assert finished.startswith(tokenizer.decode(ids))


class Later(clocks.datetime):
    """Another day."""

    @classmethod
    def now(cls, tz: clocks.tzinfo | None = None) -> "Later":
        return cls(2031, 5, 6, 7, 8, 9)


CLOCKS = {
    "to the second": "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + tiny.CHATML,
    "in words": "{{ strftime_now(format='%A') if false else strftime_now('%A, %B') }}" + tiny.CHATML,
    "Llama's": tiny.LLAMA32,
    "SmolLM3's": tiny.SMOLLM3,
    "in a macro": "{% macro today() %}{{ strftime_now('%j') }}{% endmacro %}{{ today() }}" + tiny.CHATML,
}


@pytest.mark.parametrize("name", CLOCKS)
def test_prompts_do_not_depend_on_the_day(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny.byte_tokenizer(CLOCKS[name])
    today = chat_prompt(tokenizer, TURNS)
    real = tokenizer.apply_chat_template(TURNS, tokenize=False)
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) != real, "the other day must show"
    assert chat_prompt(tokenizer, TURNS) == today
    assert template_settings(tokenizer)["date"] == "2024-07-26"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (tiny.DEEPSEEK_R1, "does not write a reply right after the header of a turn"),
        (tiny.CHATML.replace("assistant\n'", "assistant\n<think>\n'"), "does not write a reply right after the header"),
        # Reads parts of a message, and finds none in a text.
        (
            "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
            "does not write a reply",
        ),
        ("{{ range(1000) | random }}" + tiny.CHATML, "draws random numbers"),
        ("{{ lipsum(1, false) }}" + tiny.CHATML, "draws random numbers"),
        ("{{ strftime_now }}" + tiny.CHATML, "writes an address in memory"),
        ("{{ raise_exception('System role needed') }}", r"cannot write turns .* \(System role needed\)"),
        ("{{ messages[0].content + 1 }}", "cannot write turns"),
        ("{% for m in messages %}", "cannot write turns"),
        ("{% if messages | length > 1 %}{{ undefined.name }}{% endif %}", "cannot write turns"),
    ],
)
def test_templates_that_no_benchmark_can_use_are_one_sentence(template: str, message: str) -> None:
    tokenizer = tiny.byte_tokenizer(template)
    for use in (lambda: chat_prompt(tokenizer, TURNS), lambda: template_settings(tokenizer)):
        with pytest.raises(PipelineError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_rare_branch_that_draws_is_caught_when_it_is_taken() -> None:
    tokenizer = tiny.byte_tokenizer(
        "{% if 'snow' in messages[-1].content %}{{ [1] | random }}{% endif %}" + tiny.CHATML
    )
    chat_prompt(tokenizer, TURNS[:1])
    state = random.getstate()
    with pytest.raises(PipelineError, match="draws random numbers"):
        chat_prompt(tokenizer, TURNS)
    assert random.getstate() == state


@pytest.mark.parametrize(
    "change",
    ["m.content | upper", "m.content[:4]", "m.content | replace('snow', 'ice')", "m.content | tojson | reverse"],
)
def test_a_text_that_a_template_changes_is_refused(change: str) -> None:
    tokenizer = tiny.byte_tokenizer(tiny.CHATML.replace("m.content", f"({change})"))
    with pytest.raises(PipelineError):
        chat_prompt(tokenizer, TURNS)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.sampled_from(sorted(KNOWN)))
def test_every_text_is_in_its_prompt_or_the_prompt_is_refused(texts: list[str], name: str) -> None:
    tokenizer = tiny.byte_tokenizer(getattr(tiny, name))
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    try:
        prompt = chat_prompt(tokenizer, messages)
    except PipelineError:
        # Qwen's template takes what stands before a mark for thoughts, and all trim.
        assert any("</think>" in text for text in texts)
        return
    place = 0
    for text in texts:
        place = prompt.index(text.strip(), place) + len(text.strip())


@pytest.mark.parametrize(
    ("template", "ids", "expected"),
    [
        (tiny.CHATML, "<|im_end|>", "<|im_end|>"),
        (tiny.CHATML, ["</s>", "<|im_end|>"], "<|im_end|>"),
        (tiny.LLAMA32, ["</s>", "<|eot_id|>"], "<|eot_id|>"),
        # Phi-3 ends a turn, and then the text.
        (
            tiny.CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
            ["</s>", "<|im_end|>"],
            "<|im_end|>",
        ),
        # Nothing stands behind a turn: whatever ends a text ends it.
        ("{% for m in messages %}{{ m.content + ' ' }}{% endfor %}", "</s>", "</s>"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_end_of_a_turn(template: str, ids: str | list[str], expected: str, nested: bool, tmp_path: Path) -> None:
    tokenizer = tiny.byte_tokenizer(template)
    value = tokenizer.convert_tokens_to_ids(ids)
    config = {"eos_token_id": None, "text_config": {"eos_token_id": value}} if nested else {"eos_token_id": value}
    model = tiny.save(tokenizer, tmp_path, **config)
    assert end_of_turn(model, tokenizer) == tokenizer.convert_tokens_to_ids(expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"eos_token_id": "<s>"}', "eos_token_id '<s>' is no token id"),
        ('{"eos_token_id": [2, null]}', "is no token id"),
        ('{"eos_token_id": true}', "is no token id"),
        ('{"eos_token_id": []}', "is no token id"),
        (
            '{"eos_token_id": 1}',
            r"the chat template ends a turn with <\|im_end\|> \(\d+\), which eos_token_id 1 does not",
        ),
        ("{}", "no eos_token_id"),
        ("[1]", "is no JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_a_wrong_end_of_a_turn_is_one_sentence(config: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(PipelineError, match=message):
        end_of_turn(tmp_path, tiny.byte_tokenizer(tiny.CHATML))


DIALOGUE = [
    {"role": "user", "content": "Rain?\nToday?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And snow?"},
]


def test_a_base_model_reads_a_transcript(base_model: Path) -> None:
    tokenizer = load_tokenizer(base_model)
    text = "User: Rain?\nToday?\n\nAssistant: Yes.\n\nUser: And snow?\n\nAssistant:"
    assert chat_prompt(tokenizer, DIALOGUE) == text
    assert end_of_turn(base_model, tokenizer) is None
    ids, prompt_len = encode_reply(tokenizer, DIALOGUE, "No.", None)
    assert list(ids) == tokenizer(f"{text} No.").input_ids
    assert tokenizer.decode(ids[:prompt_len]) == f"<|im_start|>{text}"


def test_a_chat_model_reads_its_template(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    prompt = chat_prompt(tokenizer, DIALOGUE)
    assert prompt == tokenizer.apply_chat_template(DIALOGUE, tokenize=False, add_generation_prompt=True)
    end = end_of_turn(smollm2, tokenizer)
    ids, prompt_len = encode_reply(tokenizer, DIALOGUE, "No.", end)
    assert tokenizer.decode(ids[:prompt_len]) == prompt
    assert tokenizer.decode(ids[prompt_len:]) == "No.<|im_end|>"
