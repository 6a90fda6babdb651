"""The chat as its user meets it: replies on stdout, what the cache holds on stderr, and what ``generate`` would say."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pipeline.models.layout import cache_layout
from pipeline.policy.agents import AgentParams, Policy, PolicyShape, save_policy
from pipeline.profiles import render
from pipeline.samples.conversation import Conversation
from tests.commands import in_this_process
from tests.conftest import MakeModel
from tests.samples import tokenizers as tiny

REPOSITORY = Path(__file__).parent.parent
POLICY = "policies/smollm2-135m/ruler/exact"
CHAT = ("--model", "smollm2-135m", "--policy", POLICY, "--max-new-tokens", "12")


@pytest.fixture
def project(tmp_path: Path, make_model: MakeModel) -> tuple[Path, PreTrainedModel]:
    """A params.yaml, a tiny model that reads and writes bytes, and a policy of its shape."""
    (tmp_path / "params.yaml").write_text(render("ci", REPOSITORY / "profiles").params)
    tokenizer = tiny.byte_tokenizer(tiny.CHATML)
    model = make_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(tmp_path / "models/smollm2-135m")
    tokenizer.save_pretrained(tmp_path / "models/smollm2-135m")
    layout = cache_layout(model)
    agent = AgentParams(hidden_width=8, hidden_layers=1, inputs=("key", "value", "position"))
    shape = PolicyShape(len(layout.ranked), layout.kv_heads, layout.head_dim, agent)
    (tmp_path / POLICY).mkdir(parents=True)
    save_policy(tmp_path / POLICY, Policy(shape, torch.Generator().manual_seed(0)), {"model": "smollm2-135m"})
    return tmp_path, model


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_dialogue_that_fits_is_what_the_model_says_without_eviction(
    project: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, model = project
    say(monkeypatch, "Rain?", "And snow?")
    done = in_this_process(directory, "stages.chat", *CHAT, "--budget", "500")
    assert done.returncode == 0, done.stderr
    tokenizer = tiny.byte_tokenizer(tiny.CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    conversation, replies = Conversation(tokenizer, {end}), []
    for question in ("Rain?", "And snow?"):
        conversation.ask(question)
        ids = torch.tensor([conversation.ids])
        written = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=0)
        conversation.reply(written[0, ids.shape[1] :].tolist())
        replies.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    assert done.stdout == "".join(f"{reply}\n" for reply in replies)


def test_it_says_what_the_cache_holds(project: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, *["How much rain was there in all the days of the year?"] * 4)
    done = in_this_process(project[0], "stages.chat", *CHAT, "--budget", "60", "--slack", "4", "--temperature", "0.7")
    assert done.returncode == 0, done.stderr
    held, seen, megabytes, without = (
        [float(number.replace(",", "")) for number in column]
        for column in zip(
            *re.findall(
                r"\[([\d,]+) of ([\d,]+) tokens in the cache of each head, ([\d.]+) MB; without eviction ([\d.]+) MB\]",
                done.stderr,
            ),
            strict=True,
        )
    )
    assert len(held) == 4
    assert all(60 <= tokens <= 64 for tokens in held)
    assert seen == sorted(seen)
    assert seen[-1] > 4 * 60
    assert megabytes[-1] < without[-1]


def test_a_dialogue_longer_than_the_model_knows_ends_with_a_sentence(
    project: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, "word " * 405)
    done = in_this_process(project[0], "stages.chat", *CHAT)
    assert done.returncode == 1
    assert done.stderr == (
        "error: The dialogue has 2,043 tokens, which with a reply of 12 (--max-new-tokens) are more than the 2,048 "
        "positions that smollm2-135m knows; begin a new one.\n"
    )


def test_a_mark_of_turns_is_refused_and_the_dialogue_goes_on(
    project: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for lines in (["Rain?"], ["Hi <|im_end|>", "Rain?"]):
        say(monkeypatch, *lines)
        said.append(in_this_process(project[0], "stages.chat", *CHAT))
    assert [done.returncode for done in said] == [0, 0]
    assert said[0].stdout == said[1].stdout
    assert said[1].stderr.startswith("error: The text holds <|im_end|>, by which the model tells turns apart; write it")


def test_bytes_that_are_no_text_are_read_as_question_marks(
    project: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for line in (b"caf\xe9".decode(errors="surrogateescape"), "caf?"):
        say(monkeypatch, line)
        said.append(in_this_process(project[0], "stages.chat", *CHAT))
    assert said[0].returncode == 0, said[0].stderr
    assert said[0].stdout == said[1].stdout


@pytest.mark.parametrize(
    "option", [("--temperature", "-1"), ("--temperature", "inf"), ("--seed", str(2**64)), ("--slack", "-1")]
)
def test_numbers_that_mean_nothing_are_refused(option: tuple[str, str], project: tuple[Path, PreTrainedModel]) -> None:
    done = in_this_process(project[0], "stages.chat", *CHAT, *option)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_budget_below_the_protected_tokens_is_one_sentence(project: tuple[Path, PreTrainedModel]) -> None:
    done = in_this_process(project[0], "stages.chat", *CHAT, "--budget", "10")
    assert (done.returncode, done.stderr) == (1, "error: budget=10 is below the 20 protected tokens; raise it.\n")
