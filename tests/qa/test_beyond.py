"""Beyond the 2x2: the curriculum, and the reinforcement learning that follows. (kl_mix.py: with its siblings.)"""

import json

import pytest
import torch
import transformers
from conftest import arguments_of, even_length, read_log, run, write_jsonl
from test_scripts import SGD, load

import curriculum
import grpo
from common import entropy

LADDER = dict(lengths="2,4,6,8", max_new_tokens=8, steps=12, eval_every=0, save_every=100, h_min=1.0, held_out=2)


@pytest.mark.parametrize(
    "trace, on_closed, steps_at",
    [
        ([2, 2, 2, 2], "stop", [(2, 3), (4, 3), (6, 3), (8, 3)]),  # always stable: the whole ladder
        ([2, 2, 2, 2], "stop", [(2, 1), (4, 2), (6, 1), (8, 2)]),  # whatever the number of steps, shares differ by 1
        ([2, 1.0, 0.9], "stop", [(2, 3), (4, 3), (6, 3)]),  # H_min itself is stable; 6 was not: end with 4's weights
        ([2, 2, 0.9], "continue", [(2, 3), (4, 3), (6, 3), (4, 3)]),  # back to 4, and the gate is not asked again
        ([0.5], "stop", [(2, 3)]),  # not even the first length
        ([0.5], "continue", [(2, 12)]),
    ],
)
def test_a_gate_gives_the_schedule_worked_out_by_hand(trace, on_closed, steps_at, world, tmp_path, monkeypatch):
    """A closed gate brings back weights and optimizer of the last stable checkpoint, exactly."""
    values, out = iter(trace), tmp_path / "run"
    monkeypatch.setattr(curriculum, "respond", lambda *a, **k: [dict(nats=5 * next(values), length=5)])
    schedule = [length for length, steps in steps_at for _ in range(steps)]
    steps = len(schedule) if min(trace) > 1 else 12
    more = dict(on_closed=on_closed, steps=steps, save_every=1, keep_checkpoints=on_closed == "stop", out_dir=out)
    run("curriculum", **world | LADDER | more)
    rows = read_log(out)[1:]
    assert [row["train_len"] for row in rows] == schedule
    assert all(row["response_len"] <= row["train_len"] for row in rows)
    gates = [row for row in rows if "gate_entropy" in row]
    assert [(row["gate_entropy"], row["gate_open"]) for row in gates] == [(h, h >= 1) for h in trace]
    assert "avg_at_k" in rows[-1] and (out / "model/config.json").exists()
    if on_closed == "stop" and trace[-1] < 1.0 and len(trace) > 1:
        saved = [out / f"checkpoint-{row['step']}" for row in gates[-2:]]
        states = [torch.load(path / "training_state.pt")["optimizer"]["state"] for path in saved]
        assert states[0] and all(torch.equal(states[1][n][k], x) for n, s in states[0].items() for k, x in s.items())
        models = [load(path).state_dict() for path in [*saved, out / "model"]]
        assert all(torch.equal(x, other[name]) for name, x in models[0].items() for other in models)


def test_the_gate_measures_entropy_on_held_out_prompts_at_the_length_of_its_stage(world, tmp_path, monkeypatch):
    """... in nats per token, at temperature 1, whatever the rollouts' is: read off the checkpoint of that step."""
    found, respond = [], curriculum.respond
    monkeypatch.setattr(curriculum, "respond", lambda *a, **k: found.append((a[1], respond(*a, **k))) or found[-1][1])
    more = dict(keep_checkpoints=True, temperature=0.3, top_k=2, h_min=0)
    run("curriculum", **world | LADDER | more, out_dir=tmp_path / "run")
    rows = [json.loads(line) for line in open(world["data"], encoding="utf-8")]
    gates = [row for row in read_log(tmp_path / "run")[1:] if "gate_entropy" in row]
    for row, (problems, records), length in zip(gates, found, (2, 4, 6, 8), strict=True):
        assert [p.question for p in problems] == [r["question"] for r in rows[-2:]]
        assert max(r["length"] for r in records) == length == row["train_len"]
        model, nats, tokens = load(tmp_path / f"run/checkpoint-{row['step']}"), 0, 0
        for p, r in zip(problems, records, strict=True):
            logits = model(torch.tensor([[*p.prompt, *r["response_ids"]]])).logits[0, len(p.prompt) - 1 : -1]
            nats, tokens = nats + entropy(logits).sum().item(), tokens + len(logits)
        assert row["gate_entropy"] == pytest.approx(nats / tokens, rel=1e-4)


@pytest.mark.parametrize(
    "script, prefixes, kl",
    [("dagger_onpolicy", "student", "forward"), ("opd", "student", "reverse"), ("kl_mix", "student", "mixed")]
    + [("sft_offpolicy", "teacher", "forward"), ("offline_rl_distill", "teacher", "reverse")],
)
def test_the_curriculum_runs_every_objective(script, prefixes, kl, world, tmp_path):
    """At a ladder of one length it is the fixed-length script, number for number, on the rows not held out."""
    one = dict(eval_every=0, estimator="sampled", warmup_steps=2)
    more = dict(lengths="6", held_out=2, h_min=0.0, prefixes=prefixes, kl=kl)
    run("curriculum", **world | one | more, out_dir=tmp_path / "a")
    lines = open(world["data"], encoding="utf-8").read().splitlines()[:-2]
    data = write_jsonl(tmp_path / "less.jsonl", map(json.loads, lines))
    run(script, **world | one | dict(data=data), out_dir=tmp_path / "b")
    for row, expected in zip(read_log(tmp_path / "a"), read_log(tmp_path / "b"), strict=True):
        assert {name: row[name] for name in expected} == expected
    assert all(map(torch.equal, load(tmp_path / "a/model").parameters(), load(tmp_path / "b/model").parameters()))


@pytest.mark.parametrize("must_finish", [False, True])
def test_grpo_is_the_loop_that_one_would_write_down(must_finish, world, tmp_path, monkeypatch):
    """Two steps: advantages within the group, full logits, one response at a time, a mean over all tokens, the gradient
    clipped, a warm-up, SGD. Of even length, and finished if asked for, is a right answer here."""
    steps, sample = [], grpo.sample
    monkeypatch.setattr(grpo, "grade", even_length)
    monkeypatch.setattr(grpo, "sample", lambda *a, **k: steps.append(sample(*a, **k)) or steps[-1])
    monkeypatch.setattr(torch.optim, "AdamW", SGD)
    more = dict(batch_size=2, group_size=6, steps=2, lr=4.0, warmup_steps=2, max_new_tokens=9, max_grad_norm=0.3)
    more |= dict(rollout_batch_size=5, must_finish=must_finish, eval_data="none")
    more |= dict(student=world["teacher"])  # which has two dozen end tokens
    run("grpo", **arguments_of("grpo", world, **more), out_dir=tmp_path / "run")

    model, tokenizer = load(world["teacher"]), transformers.AutoTokenizer.from_pretrained(world["teacher"])
    ends = model.config.eos_token_id
    for logged, rollouts, lr in zip(read_log(tmp_path / "run")[1:], steps, (2.0, 4.0), strict=True):
        texts = [tokenizer.decode([i for i in ids if i not in ends]) for ids in rollouts.responses()]
        right = torch.tensor([even_length(text, None) for text in texts])
        assert (right > rollouts.ended).any() and (right & rollouts.ended).any(), "right and cut, right and finished"
        rewards = (right & rollouts.ended if must_finish else right).float().view(2, 6)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, unbiased=False, keepdim=True) + 1e-4)
        losses = []
        for ids, mask, advantage in zip(rollouts.ids, rollouts.mask, advantages.flatten()):
            last = int(mask.nonzero()[-1]) + 1
            log_q = model(ids[None, :last]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:last, None])[:, 0]
            losses.append(-advantage * log_q[mask[1:last]])
        loss = torch.cat(losses).mean()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = sum(g.square().sum() for g in grads).sqrt()
        assert norm > 0.3, "there is something to clip"
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads):
                p -= lr * 0.3 / norm * g
        found = [logged[name] for name in ("loss", "grad_norm", "lr", "reward")]
        expected = [x.item() for x in (loss, norm, torch.tensor(lr), rewards.mean())]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for p, expected in zip(load(tmp_path / "run/model").parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-3, atol=1e-5)


def test_grpo_says_when_there_is_nothing_to_learn_from(world, tmp_path, capsys):
    """A random model is never right: all rewards are 0, and so are all advantages."""
    run("grpo", **arguments_of("grpo", world, steps=11, eval_data="none"), out_dir=tmp_path / "run")
    assert capsys.readouterr().out.count("warning: the gradient was 0 for ten steps, so nothing is learned") == 1
    assert [row["grad_norm"] for row in read_log(tmp_path / "run")[1:]] == [0.0] * 11
