"""Beyond the 2x2: the mixture, the curriculum, and the reinforcement learning that follows."""

import json

import pytest
import torch
import transformers
from conftest import even_length, read_log, run
from test_reliability import Killed
from test_scripts import code_diff

from common import make_rollouts
from plumbing.fast import token_log_probs
from plumbing.models import Vocab
from plumbing.runs import Run


# ----------------------------------------------------------------------------------------------------------------
# kl_mix.py


def first_gradient(script, world, out_dir, monkeypatch, **changes):
    """The gradient of a script's first step, as one vector."""
    grads = []

    class Seen(BaseException):
        pass

    def clip(parameters, _):
        grads.append(torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None]))
        raise Seen

    with monkeypatch.context() as patch, pytest.raises(Seen):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        run(script, **world | changes, out_dir=out_dir)
    return grads[0]


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_the_mixture_is_linear_between_dagger_and_opd(estimator, world, tmp_path, monkeypatch):
    """λ = 0 is dagger_onpolicy.py's first gradient, λ = 1 is opd.py's, and in between it is affine in λ."""

    def gradient(script, **changes):
        name = f"{script}-{changes.get('lam')}"
        return first_gradient(script, world, tmp_path / name, monkeypatch, estimator=estimator, **changes)

    forward, reverse = gradient("dagger_onpolicy"), gradient("opd")
    assert (forward - reverse).norm() > 0.1 * forward.norm()
    for lam, expected in ((0, forward), (1, reverse), (0.3, 0.7 * forward + 0.3 * reverse)):
        mixed = gradient("kl_mix", lam=lam)
        assert (mixed - expected).norm() < 1e-6 * max(1, expected.norm()), lam


def test_the_mixture_adds_one_field_and_changes_the_marked_line():
    how = "micro_loss, micro_entropy = weighted_kl({}, student, teacher, micro, token_weights, run.vocab, args.estimator, args.ends)"
    assert code_diff("opd", "kl_mix") == [
        "+from functools import partial",
        "-from common import TeacherRollouts, evaluate, forward_kl, reverse_kl, sample, weighted_kl",
        "+from common import evaluate, mixed_kl, sample, weighted_kl",
        "+lam: float = 0.2",
        "+kl = partial(mixed_kl, lam=args.lam)",
        "-" + how.format("reverse_kl"),
        "+" + how.format("kl"),
    ]


@pytest.mark.parametrize("lam", [0, 0.5, 1])
def test_null_mixture(lam, world, tmp_path):
    run("kl_mix", **world | {"student": world["teacher"], "lam": lam, "steps": 1}, out_dir=tmp_path / "run")
    row = read_log(tmp_path / "run")[1]
    assert abs(row["loss"]) < 1e-6 and row["grad_norm"] < 1e-4


# ----------------------------------------------------------------------------------------------------------------
# curriculum.py

LADDER = dict(lengths="2,4,6,8", max_new_tokens=8, steps=12, eval_every=0, save_every=100, h_min=1.0, held_out=2)


def scripted(monkeypatch, trace):
    """Let the gate see this entropy trace instead of a measurement."""
    import curriculum

    values = iter(trace)
    monkeypatch.setattr(curriculum, "mean_entropy", lambda *a: (next(values), 0.0))


@pytest.mark.parametrize(
    "trace, on_closed, schedule",
    [
        ([2, 2, 2, 2], "stop", [2] * 3 + [4] * 3 + [6] * 3 + [8] * 3),  # always stable: the whole ladder
        ([2, 1.0, 0.9], "stop", [2] * 3 + [4] * 3 + [6] * 3),  # H_min itself is stable; 6 was not: end with 4's weights
        ([2, 2, 0.9], "continue", [2] * 3 + [4] * 3 + [6] * 3 + [4] * 3),  # back to 4, and the gate is not asked again
        ([0.5], "stop", [2] * 3),  # not even the first length
        ([0.5], "continue", [2] * 12),
    ],
)
def test_an_entropy_trace_gives_the_length_schedule_worked_out_by_hand(
    trace, on_closed, schedule, world, tmp_path, monkeypatch
):
    scripted(monkeypatch, trace)
    run("curriculum", **world | LADDER | {"on_closed": on_closed}, out_dir=tmp_path / "run")
    rows = read_log(tmp_path / "run")[1:]
    assert [row["train_len"] for row in rows] == schedule
    assert all(row["response_len"] <= row["train_len"] for row in rows)
    assert [row["gate_entropy"] for row in rows if "gate_entropy" in row] == trace
    assert "avg_at_k" in rows[-1] and (tmp_path / "run/model/config.json").exists()


@pytest.mark.parametrize("steps", [4, 6, 9, 11])
def test_every_length_gets_its_share_of_steps(steps, world, tmp_path, monkeypatch):
    scripted(monkeypatch, [2] * 4)
    run("curriculum", **world | LADDER | {"steps": steps}, out_dir=tmp_path / "run")
    trained = [row["train_len"] for row in read_log(tmp_path / "run")[1:]]
    shares = [trained.count(length) for length in (2, 4, 6, 8)]
    assert trained == sorted(trained) and sum(shares) == steps and max(shares) - min(shares) <= 1


def test_a_closed_gate_returns_the_last_stable_checkpoint(world, tmp_path, monkeypatch):
    """The run that fails at length 6 ends with the weights that it had after length 4."""
    scripted(monkeypatch, [2, 2, 0.9])
    run("curriculum", **world | LADDER, out_dir=tmp_path / "closed")
    scripted(monkeypatch, [2, 2, 2, 2])
    states = {}  # the weights of the whole ladder's run, after step 6
    keep = Run.save_state

    def spy(run, name=None):
        states.setdefault(run.step, {n: p.clone() for n, p in run.student.state_dict().items()})
        return keep(run, name)

    monkeypatch.setattr(Run, "save_state", spy)
    run("curriculum", **world | LADDER, out_dir=tmp_path / "whole")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "closed/model").state_dict()
    assert all(torch.equal(weight, states[6][name]) for name, weight in model.items())
    assert any(not torch.equal(weight, states[9][name]) for name, weight in model.items())


@pytest.mark.parametrize(
    "where, kill_at",
    [
        ("sample", 2),
        ("sample", 4),
        ("sample", 7),
        ("sample", 10),
        ("_log", 4),
        ("_log", 7),
        ("save_state", 2),
        ("save_state", 5),
    ],
)
def test_the_curriculum_survives_a_kill_in_a_stage_and_at_a_transition(where, kill_at, world, tmp_path, monkeypatch):
    """With the real gate, at an H_min that closes it on the way: state, history and weights are those of a whole run."""
    import curriculum

    arguments = world | LADDER | dict(save_every=2, on_closed="continue", h_min=4.4)
    if not (tmp_path.parent / "whole").exists():
        run("curriculum", **arguments, out_dir=tmp_path.parent / "whole")
    place = curriculum if where == "sample" else Run
    original, calls = getattr(place, where), []

    def kill(*args, **kwargs):
        calls.append(1)
        if len(calls) == kill_at:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(place, where, kill)
        run("curriculum", **arguments, out_dir=tmp_path / "cut")
    run("curriculum", **arguments, out_dir=tmp_path / "cut")
    assert read_log(tmp_path / "cut") == read_log(tmp_path.parent / "whole")


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
    data = tmp_path / "less.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(script, **world | dict(data=data, steps=3, eval_every=0), out_dir=tmp_path / "b/run")
    for row, expected in zip(read_log(tmp_path / "a/run")[1:], read_log(tmp_path / "b/run")[1:], strict=True):
        assert all(row[key] == expected[key] for key in ("loss", "grad_norm", "response_len", "entropy"))


# ----------------------------------------------------------------------------------------------------------------
# grpo.py


def test_advantages_are_standardised_within_the_group():
    """Two groups with offset rewards have the same advantages; a group of equal rewards has none, and no NaN."""
    from grpo import group_advantages

    rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0], [10.0, 11.0, 10.0, 11.0], [1.0, 1.0, 1.0, 1.0]])
    advantages = group_advantages(rewards)
    torch.testing.assert_close(advantages[0], advantages[1])
    torch.testing.assert_close(advantages[0], torch.tensor([-1.0, 1.0, -1.0, 1.0]), atol=1e-3, rtol=0)
    assert advantages[2].tolist() == [0.0] * 4


def test_the_surrogate_is_its_definition_and_its_gradient_that_of_finite_differences():
    from grpo import clipped_surrogate

    torch.manual_seed(0)
    new, old, advantages = torch.randn(3, 200, dtype=torch.float64) * 0.4
    value = clipped_surrogate(new, old, advantages, 0.2)
    for l, o, a, v in zip(new.tolist(), old.tolist(), advantages.tolist(), value.tolist()):
        import math

        ratio = math.exp(l - o)
        assert v == pytest.approx(-min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
    assert torch.autograd.gradcheck(lambda x: clipped_surrogate(x, old, advantages, 0.2), new.requires_grad_())
    x = torch.zeros(1, requires_grad=True)  # on-policy: ρ = 1, and the gradient is −A ∇ log q
    assert torch.autograd.grad(clipped_surrogate(x, x.detach(), torch.tensor([1.7]), 0.2), x)[
        0
    ].item() == pytest.approx(-1.7)


def test_log_probabilities_are_those_of_full_logits(world):
    model = transformers.AutoModelForCausalLM.from_pretrained(world["student"]).eval()
    vocab = Vocab(model.config.vocab_size, (302,), 302)
    prompts, responses = [(5, 6, 7), (8, 9)], [(20, 21), (30, 31, 32, 33)]
    batch = make_rollouts(prompts, responses, [True] * 2, [(0, 1, 0), (0, 1, 1)], vocab, "cpu")
    found = token_log_probs(model, batch, vocab, chunk=4)
    expected = []
    for prompt, response in zip(prompts, responses):
        ids = torch.tensor([[*prompt, *response]])
        log_probs = model(ids).logits[0].log_softmax(-1)
        expected += [log_probs[len(prompt) + t - 1, y] for t, y in enumerate(response)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_grpo_reinforces_what_was_better_than_its_group(world, tmp_path, monkeypatch):
    """With a reward for texts of even length the reward rises; with equal rewards nothing moves, and nothing is NaN."""
    import grpo

    arguments = world | dict(batch_size=4, group_size=8, steps=40, eval_every=0, lr=1e-2)
    del arguments["teacher"]
    monkeypatch.setattr(grpo, "grade", even_length)
    run("grpo", **arguments, out_dir=tmp_path / "run")
    rewards = [row["reward"] for row in read_log(tmp_path / "run")[1:]]
    assert sum(rewards[-7:]) > sum(rewards[:7]) + 1.5
    monkeypatch.setattr(grpo, "grade", lambda text, answer, grading: True)
    run("grpo", **arguments | {"steps": 2}, out_dir=tmp_path / "equal")
    assert all(row["grad_norm"] == 0 and row["reward"] == 1 for row in read_log(tmp_path / "equal")[1:])


def test_grpo_first_gradient_is_the_policy_gradient_of_the_definition(world, tmp_path, monkeypatch):
    """−Σ A ∇ log q / tokens, one sequence at a time, on full logits; and more than one update starts from the same."""
    import grpo

    monkeypatch.setattr(grpo, "grade", even_length)
    seen = {}
    sample = grpo.sample
    monkeypatch.setattr(grpo, "sample", lambda *a, **k: seen.setdefault("rollouts", sample(*a, **k)))
    arguments = {k: v for k, v in world.items() if k != "teacher"} | dict(batch_size=2, group_size=4)
    gradient = first_gradient("grpo", arguments, tmp_path / "a", monkeypatch)
    again = first_gradient("grpo", arguments | {"updates_per_step": 2}, tmp_path / "b", monkeypatch)
    torch.testing.assert_close(again, gradient, rtol=1e-4, atol=1e-7)

    model = transformers.AutoModelForCausalLM.from_pretrained(world["student"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(world["student"])
    rollouts = seen["rollouts"]
    texts = tokenizer.batch_decode(rollouts.responses(), skip_special_tokens=True)
    rewards = torch.tensor([float(even_length(text, None)) for text in texts]).view(2, 4)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, unbiased=False, keepdim=True) + 1e-4)
    loss = 0.0
    for ids, mask, prompt, a in zip(rollouts.ids, rollouts.mask, rollouts.prompt_mask, advantages.flatten()):
        ids = ids[torch.cat([prompt, mask])]
        log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        loss = loss - a * log_probs[-int(mask.sum()) :].sum() / rollouts.mask.sum()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in grads]), rtol=1e-3, atol=1e-6)
