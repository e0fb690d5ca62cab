"""Beyond the 2x2: the mixture, the curriculum, and the reinforcement learning that follows."""

import json
import math

import pytest
import torch
import transformers
from conftest import arguments_of, even_length, read_log, run, write_jsonl
from test_scripts import HOW, code_diff

import curriculum
import grpo
from plumbing.fast import token_log_probs
from plumbing.models import Vocab

# ----------------------------------------------------------------------------------------------------------------
# kl_mix.py


def test_the_mixture_adds_one_field_and_changes_the_marked_line():
    assert code_diff("opd", "kl_mix") == [
        "+from functools import partial",
        "-from common import TeacherRollouts, evaluate, forward_kl, reverse_kl, sample, weighted_kl",
        "+from common import evaluate, mixed_kl, sample, weighted_kl",
        "+lam: float = 0.2",
        "+kl = partial(mixed_kl, lam=args.lam)",
        "-" + HOW.format("reverse_kl"),
        "+" + HOW.format("kl"),
    ]


# ----------------------------------------------------------------------------------------------------------------
# curriculum.py

LADDER = dict(lengths="2,4,6,8", max_new_tokens=8, steps=12, eval_every=0, save_every=100, h_min=1.0, held_out=2)


def scripted(monkeypatch, trace):
    """Let the gate see this entropy trace instead of a measurement."""
    values = iter(trace)
    monkeypatch.setattr(curriculum, "mean_entropy", lambda *a: (next(values), 0.0))


@pytest.mark.parametrize(
    "trace, on_closed, steps_at",
    [
        ([2, 2, 2, 2], "stop", [(2, 3), (4, 3), (6, 3), (8, 3)]),  # always stable: the whole ladder
        ([2, 2, 2, 2], "stop", [(2, 1), (4, 1), (6, 1), (8, 1)]),  # whatever the number of steps, shares differ by 1
        ([2, 2, 2, 2], "stop", [(2, 1), (4, 2), (6, 1), (8, 2)]),
        ([2, 1.0, 0.9], "stop", [(2, 3), (4, 3), (6, 3)]),  # H_min itself is stable; 6 was not: end with 4's weights
        ([2, 2, 0.9], "continue", [(2, 3), (4, 3), (6, 3), (4, 3)]),  # back to 4, and the gate is not asked again
        ([0.5], "stop", [(2, 3)]),  # not even the first length
        ([0.5], "continue", [(2, 12)]),
    ],
)
def test_an_entropy_trace_gives_the_schedule_worked_out_by_hand(
    trace, on_closed, steps_at, world, tmp_path, monkeypatch
):
    scripted(monkeypatch, trace)
    schedule = [length for length, steps in steps_at for _ in range(steps)]
    steps = len(schedule) if min(trace) > 1 else 12
    run("curriculum", **world | LADDER | {"on_closed": on_closed, "steps": steps}, out_dir=tmp_path / "run")
    rows = read_log(tmp_path / "run")[1:]
    assert [row["train_len"] for row in rows] == schedule
    assert all(row["response_len"] <= row["train_len"] for row in rows)
    assert [row["gate_entropy"] for row in rows if "gate_entropy" in row] == trace
    assert "avg_at_k" in rows[-1] and (tmp_path / "run/model/config.json").exists()


def test_a_closed_gate_returns_the_last_stable_checkpoint(world, tmp_path, monkeypatch):
    """The run that is not stable at length 6 ends with the weights of the run whose ladder ends with length 4."""
    for name, trace, more in (("closed", [2, 2, 0.9], {}), ("short", [2, 2], dict(lengths="2,4", steps=6))):
        scripted(monkeypatch, trace)
        run("curriculum", **world | LADDER | more, out_dir=tmp_path / name)
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / n / "model") for n in ("closed", "short")]
    closed, short = (model.state_dict() for model in models)
    assert all(torch.equal(weight, short[name]) for name, weight in closed.items())


@pytest.mark.parametrize(
    "script, prefixes, kl",
    [
        ("dagger_onpolicy", "student", "forward"),
        ("opd", "student", "reverse"),
        ("kl_mix", "student", "mixed"),
        ("sft_offpolicy", "teacher", "forward"),
        ("offline_rl_distill", "teacher", "reverse"),
    ],
)
def test_the_curriculum_runs_every_objective(script, prefixes, kl, world, tmp_path):
    """At a ladder of one length it is the fixed-length script, number for number."""
    one = dict(lengths="6", steps=3, held_out=2, h_min=0.0, prefixes=prefixes, kl=kl, eval_every=0)
    run("curriculum", **world | one, out_dir=tmp_path / "a/run")
    rows = [json.loads(line) for line in open(world["data"])][:-2]  # what is not held out
    data = write_jsonl(tmp_path / "less.jsonl", rows)
    run(script, **world | dict(data=data, steps=3, eval_every=0), out_dir=tmp_path / "b/run")
    for row, expected in zip(read_log(tmp_path / "a/run")[1:], read_log(tmp_path / "b/run")[1:], strict=True):
        assert all(row[key] == expected[key] for key in ("loss", "grad_norm", "response_len", "entropy"))


# ----------------------------------------------------------------------------------------------------------------
# grpo.py


def test_the_surrogate_is_its_definition_and_its_gradient_that_of_finite_differences():
    torch.manual_seed(0)
    new, old, advantages = torch.randn(3, 200, dtype=torch.float64) * 0.4
    value = grpo.clipped_surrogate(new, old, advantages, 0.2)
    for l, o, a, v in zip(new.tolist(), old.tolist(), advantages.tolist(), value.tolist()):
        ratio = math.exp(l - o)
        assert v == pytest.approx(-min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
    assert torch.autograd.gradcheck(lambda x: grpo.clipped_surrogate(x, old, advantages, 0.2), new.requires_grad_())


def test_grpo_first_gradient_is_the_policy_gradient_of_the_definition(world, tmp_path, monkeypatch):
    """−Σ A ∇ log q / tokens, one sequence at a time, on full logits; and more than one update starts from the same."""
    sampled, gradients, sample, clip = [], [], grpo.sample, torch.nn.utils.clip_grad_norm_

    def seen(parameters, norm):
        parameters = list(parameters)
        gradients.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        return clip(parameters, norm)

    monkeypatch.setattr(grpo, "grade", even_length)
    monkeypatch.setattr(grpo, "sample", lambda *a, **k: sampled.append(sample(*a, **k)) or sampled[-1])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", seen)
    arguments = arguments_of("grpo", world, batch_size=2, group_size=4, steps=1)
    run("grpo", **arguments, out_dir=tmp_path / "a")
    run("grpo", **arguments | {"updates_per_step": 2}, out_dir=tmp_path / "b")
    rollouts, (gradient, again, _) = sampled[0], gradients
    torch.testing.assert_close(again, gradient, rtol=1e-4, atol=1e-7)

    model = transformers.AutoModelForCausalLM.from_pretrained(world["student"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(world["student"])
    texts = tokenizer.batch_decode(rollouts.responses(), skip_special_tokens=True)
    rewards = torch.tensor([float(even_length(text, None)) for text in texts]).view(2, 4)
    assert read_log(tmp_path / "a")[1]["reward"] == rewards.mean()
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, unbiased=False, keepdim=True) + 1e-4)
    loss, log_probs = 0.0, []
    for ids, mask, prompt, a in zip(rollouts.ids, rollouts.mask, rollouts.prompt_mask, advantages.flatten()):
        ids = ids[torch.cat([prompt, mask])]
        of_all = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        log_probs.append(of_all[-int(mask.sum()) :])
        loss = loss - a * log_probs[-1].sum() / rollouts.mask.sum()
    found = token_log_probs(model, rollouts, Vocab(model.config.vocab_size, (302,), 302), chunk=4)
    torch.testing.assert_close(found, torch.cat(log_probs), rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in grads]), rtol=1e-3, atol=1e-6)
