"""look.py: what is coloured is the reward of Proposition 1 (ii), on either prefix source."""

import re

import pytest
import torch
from conftest import argv, arguments_of, masked_inputs, run
from transformers import AutoModelForCausalLM

import common
import look
from plumbing.models import load_vocab
from plumbing.runs import parse
from plumbing.tasks import load_evals


def test_what_is_coloured_is_the_difference_of_log_probabilities(world):
    """Against logits of the whole models; and on its own rollouts its mean is minus the sampled reverse KL."""
    args = parse(look.Args, argv(arguments_of("look", world)))
    problems = load_evals(args.eval_data, 0)[args.eval_data]
    vocab, _ = load_vocab(args, [problems])
    student, teacher = (AutoModelForCausalLM.from_pretrained(world[role]).eval() for role in ("student", "teacher"))
    prompts, keys = [p.prompt for p in problems], [(0, i, 0) for i in range(len(problems))]
    rollouts = common.sample(student, prompts, keys, vocab, 6)
    tokens = rollouts.ids[:, rollouts.prompt_len :]
    with torch.no_grad():
        q, p = (m(**masked_inputs(rollouts)).logits[:, rollouts.prompt_len - 1 : -1] for m in (student, teacher))
    expected = (p.log_softmax(-1) - q.log_softmax(-1)).gather(-1, tokens[..., None])[..., 0]
    for row, mask, found in zip(expected, rollouts.mask, look.log_ratios(student, teacher, rollouts, vocab)):
        assert found == pytest.approx(row[mask].tolist(), abs=1e-4)


@pytest.mark.parametrize("prefixes", ["student", "teacher"])
def test_every_token_is_shown_once_in_the_terminal_and_in_a_picture(world, tmp_path, capsys, prefixes):
    run("look", **arguments_of("look", world, prefixes=prefixes, eval_problems=2, picture=tmp_path / "new" / "a.png"))
    said = capsys.readouterr().out
    *lengths, in_all = [int(n) for n in re.findall(r"(\d+) tokens, ", said)]
    assert len(lengths) == 2 and said.count("\033[0m") == sum(lengths) == in_all
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_of_several_processes_one_shows_it(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(look, "is_main", lambda: False)
    run("look", **arguments_of("look", world, picture=tmp_path / "a.png"))
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_blue_is_what_the_teacher_would_say_more_often():
    assert look.colour(4.0) == look.BLUE and look.colour(-9.0) == look.ORANGE and look.colour(0.0) == (255, 255, 255)
    assert look.visible("\x1b[0m\ta\n") == "·[0m·a↵", "nothing that a model says reaches the terminal as a command"
    assert look.in_terminal([("a\n", -1.24)]).count("\n") == 1 and "a↵[-1.2]" in look.in_terminal([("a\n", -1.24)])


def test_where_models_disagree_in_numbers():
    line = look.in_numbers([0.5, -0.5] * 99 + [-5.0, 1.0])
    assert line.startswith("200 tokens, |log-ratio| 0.53 nats on average"), "(99 + 5 + 1) / 200"
    assert "the largest 2 carry 6% of the sum; beyond 4 nats: 0.5%" in line, "2 of 200 tokens, 6 of 105 nats"
    assert "0.00 nats" in look.in_numbers([0.0]), "a model beside itself"
