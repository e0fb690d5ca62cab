"""look.py: what is coloured is the reward of Proposition 1 (ii), on either prefix source."""

import re

import pytest
from conftest import arguments_of, run

import common
import look
from plumbing.data import load_problems
from plumbing.models import load_model, load_tokens


def test_what_is_coloured_is_what_the_loss_compares(world):
    """... by the whole models' logits; minus the sum is the sampled reverse KL of these very tokens."""
    problems = load_problems(world["eval_data"])[0]
    tokens = load_tokens(look.Args(student=world["student"], teacher=world["teacher"]), [problems])
    student, teacher = (load_model(world[role], "fp32") for role in ("student", "teacher"))
    rollouts = common.sample(student, [p.prompt for p in problems], tokens.end_ids, 6, seed=1)
    ratios = look.log_ratios(student, teacher, rollouts, tokens.vocab_size)
    for ids, mask, found in zip(rollouts.ids, rollouts.mask, ratios, strict=True):
        q, p = (model(ids[None]).logits[0, :-1].log_softmax(-1) for model in (student, teacher))
        assert found == pytest.approx((p - q).gather(-1, ids[1:, None])[mask[1:], 0].tolist(), abs=1e-4)
    said = rollouts.ids[rollouts.mask][:, None]  # in place of what sampled_reverse_kl would draw
    sampled_kl = lambda q, p: (q.log_softmax(-1) - p.log_softmax(-1)).gather(-1, said)[:, 0]
    loss, _ = common.distillation_loss(sampled_kl, student, teacher, rollouts, rollouts.mask)
    assert loss.item() == pytest.approx(-sum(map(sum, ratios)), abs=1e-3)


@pytest.mark.parametrize("prefixes, sign", [("student", "-"), ("teacher", "+")])
def test_every_token_is_shown_once_and_drawn(prefixes, sign, world, tmp_path, monkeypatch, capsys):
    arguments = arguments_of("look", world, prefixes=prefixes, eval_problems=2)
    run("look", **arguments, picture=tmp_path / "new" / "a.png")
    said = capsys.readouterr().out
    *lengths, in_all = [int(n) for n in re.findall(r"(\d+) tokens, ", said)]
    assert len(lengths) == 2 and said.count("\033[0m") == sum(lengths) == in_all
    assert re.findall(r"Σ ([+-])\d+\.\d nats", said) == [sign] * 2, "either model prefers what it has said"
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(look, "is_main", lambda: False)
    run("look", **arguments, picture=tmp_path / "b.png")
    assert not capsys.readouterr().out and not (tmp_path / "b.png").exists(), "of several processes one shows it"


def test_blue_is_what_the_teacher_says_more_often_and_a_line_says_where_models_disagree():
    assert [*map(look.colour, (4.0, 2.0, 0.0, -9.0))] == [look.BLUE, (128, 184, 216), (255,) * 3, look.ORANGE]
    assert look.visible("\x1b[0m\ta\n") == "·[0m·a↵", "nothing reaches the terminal as a command"
    assert look.in_terminal([("a\n", -1.24)]).endswith("ma↵[-1.2]\033[0m\n")
    line = "200 tokens, |log-ratio| 0.53 nats on average; the largest 2 carry 6% of all; beyond 4 nats: 0.5%"
    assert look.in_numbers([0.5, -0.5] * 99 + [-5.0, 1.0]) == line, "2 of 200 tokens, 6 of 105 nats"
    assert "0.00 nats" in look.in_numbers([0.0]), "a model beside itself"
