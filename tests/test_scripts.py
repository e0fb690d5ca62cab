"""The four scripts as wholes: that they differ in the idea alone, keep their contracts, and survive a kill."""

import ast
import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import DISTILLATION, ROOT, SCRIPTS, argv, arguments_of, even_length, make_checkpoint, read_log, run

from plumbing import fast
from plumbing.runs import Run

CORNERS = ["sft_offpolicy", "dagger_onpolicy", "offline_rl_distill", "opd"]


# ----------------------------------------------------------------------------------------------------------------
# The diff is the lesson


def code_lines(script):
    """A script's code without docstring and comments, one normalised statement or field a line."""
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    assert isinstance(tree.body.pop(0), ast.Expr), "a script begins with its docstring"
    return ast.unparse(tree).splitlines()


def code_diff(a, b):
    import difflib

    lines = difflib.ndiff(code_lines(a), code_lines(b))
    return [line[0] + line[1:].strip() for line in lines if line[0] in "+-"]


HOW = (
    "micro_loss, micro_entropy = weighted_kl({}, student, teacher, micro, token_weights, run.vocab, args.estimator, args.ends)"
)
ON_POLICY = "rollouts = sample(student, batch.prompts, batch.keys, run.vocab, args.max_new_tokens, **sampling)"
KL = ["-" + HOW.format("reverse_kl"), "+" + HOW.format("forward_kl")]
PREFIX = [
    "+teacher_samples: int = 1",
    "+teacher_rollouts = TeacherRollouts(teacher, run, args.teacher_samples, **sampling)",
    "-" + ON_POLICY,
    "+rollouts = teacher_rollouts(batch, args.max_new_tokens)",
]


@pytest.mark.parametrize(
    "other, expected", [("dagger_onpolicy", KL), ("offline_rl_distill", PREFIX), ("sft_offpolicy", PREFIX + KL)]
)
def test_siblings_differ_in_the_idea_and_nothing_else(other, expected):
    assert code_diff("opd", other) == expected


@pytest.mark.parametrize("script", CORNERS)
def test_a_script_can_be_read_at_one_sitting(script):
    text = (ROOT / f"{script}.py").read_text()
    lines = text.splitlines()
    assert len(lines) <= 125 and max(map(len, lines)) <= 120
    assert "<-" in ast.get_docstring(ast.parse(text)), "the 2x2 table marks this file"


# ----------------------------------------------------------------------------------------------------------------
# Contracts


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
@pytest.mark.parametrize("script", DISTILLATION)
def test_a_run_leaves_what_its_contract_says(script, estimator, world, tmp_path):
    run(script, **arguments_of(script, world, estimator=estimator, eval_every=2), out_dir=tmp_path / "run")
    rows = read_log(tmp_path / "run", times=True)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    keys = {
        "step",
        "loss",
        "entropy",
        "response_len",
        "clip_ratio",
        "grad_norm",
        "lr",
        "tokens_per_s",
        "seconds",
        "flops",
    }
    evaluated = {"avg_at_k", "pass_at_k", "eval_len", "eval_entropy", "eval_marked"}
    assert all(keys <= set(row) for row in rows[1:])
    assert [evaluated <= set(row) for row in rows] == [True, False, True, True]
    assert set(rows[0]) - {"step"} <= {key for key in rows[2]} - keys, "line 0 holds an evaluation and nothing else"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert tokenizer.chat_template and model.config.vocab_size == len(tokenizer)
    saved = json.loads((tmp_path / "run/args.json").read_text())
    assert (saved["estimator"], saved["ends"]) == (estimator, "apart")
    assert not list((tmp_path / "run").glob("state*")) and not (tmp_path / "run/lock").exists()


def test_the_student_moves_and_the_teacher_does_not(world, tmp_path, monkeypatch):
    loaded, load = [], Run.load
    monkeypatch.setattr(Run, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    run("opd", **world, out_dir=tmp_path / "run")
    for model, path, moved in zip(loaded, (world["student"], world["teacher"]), (True, False)):
        before = transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
        assert any(not torch.equal(p, before[n]) for n, p in model.state_dict().items()) == moved
        assert not model.training
    assert all(p.grad is None and not p.requires_grad for p in loaded[1].parameters())


@pytest.mark.parametrize("ends", ["apart", "as_one"])
@pytest.mark.parametrize("script", DISTILLATION)
def test_null_student_equal_to_teacher_has_nothing_to_learn(script, ends, world, tmp_path):
    """... at any sampling temperature: that changes the prefixes, while the loss compares the distributions at T = 1."""
    same = arguments_of(script, world, student=world["teacher"], ends=ends, temperature=2.0, top_k=7)
    run(script, **same, out_dir=tmp_path / "run")
    assert all(abs(row["loss"]) < 1e-6 and row["grad_norm"] < 1e-4 for row in read_log(tmp_path / "run")[1:2])


@pytest.mark.parametrize("script", SCRIPTS)
def test_batches_of_any_size_do_not_change_a_run(script, world, tmp_path, monkeypatch):
    """Weights are mask / tokens of the *global* batch, not means of means: with responses of different lengths the
    two differ. And random numbers belong to rows, not to batches."""
    logs, rows, init = [], [], fast.GrowingCache.__init__
    spy = lambda self, model, start: rows.append(len(start.ids)) or init(self, model, start)  # noqa: E731
    monkeypatch.setattr(fast.GrowingCache, "__init__", spy)
    if script == "grpo":
        monkeypatch.setattr(importlib.import_module(script), "grade", even_length)
    more = dict(steps=1, estimator="sampled", max_new_tokens=30, lengths="30", held_out=3, batch_size=8)
    for size in (1, 4):
        sizes = dict(micro_batch_size=size, rollout_batch_size=(size + 2) % 6, eval_batch_size=3)
        run(script, **arguments_of(script, world, **more, **sizes), out_dir=tmp_path / str(size))
        logs.append(read_log(tmp_path / str(size))[1])
        assert size != 1 or max(rows) == 3, "as many at once as was asked for"
    for key in ("loss", "grad_norm", "entropy"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-5)
    assert logs[0]["response_len"] == logs[1]["response_len"]
    assert logs[0]["response_len"] % 1, "of different lengths"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_goes_as_far_as_clipping_and_warm_up_allow(script, world, tmp_path, monkeypatch):
    """Plain SGD moves the weights by lr · gradient; the gradient's norm is clipped to 1e-3, and at step s of a warm-up
    of 5 the rate is s/5 of --lr, afterwards all of it."""
    moved = []

    class SGD(torch.optim.SGD):
        def __init__(self, params, lr, **others):
            super().__init__(params, lr=lr)

        def step(self, closure=None):
            weights = self.param_groups[0]["params"]
            before = [p.detach().clone() for p in weights]
            super().step()
            if self.param_groups[0]["lr"]:  # saving makes a step of its own, at rate 0
                moved.append(sum((p - b).double().square().sum() for p, b in zip(weights, before)).sqrt().item())

    monkeypatch.setattr(torch.optim, "AdamW", SGD)
    if script == "grpo":
        monkeypatch.setattr(importlib.import_module(script), "grade", even_length)
    more = dict(steps=10, warmup=0.5, max_grad_norm=1e-3, lr=10.0, eval_every=0, save_every=100, group_size=8)
    run(script, **arguments_of(script, world, **more), out_dir=tmp_path / "run")
    rows = read_log(tmp_path / "run")[1:]
    for step, distance, row in zip(range(1, 11), moved, rows, strict=True):
        assert row["lr"] == pytest.approx(10.0 * min(1, step / 5))
        assert row["grad_norm"] > 2e-3, "there is something to clip"
        assert distance == pytest.approx(1e-3 * row["lr"], rel=0.02)  # fp32 weights round


# ----------------------------------------------------------------------------------------------------------------
# Stopping and going on


def test_kill_9_and_ctrl_c_from_outside(world, tmp_path):
    """With real signals to a real process (test_reliability.py has every other place). Ctrl-C finishes the step, saves, and says how to continue."""
    arguments = argv(world | dict(steps=40, save_every=5, eval_every=0))
    command = [sys.executable, str(ROOT / "opd.py"), *arguments, "--out_dir", str(tmp_path / "cut")]
    log = tmp_path / "cut/log.jsonl"
    for sent in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
        goal = {signal.SIGKILL: 7, signal.SIGINT: 13}[sent]
        while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < goal):
            time.sleep(0.01)
        process.send_signal(sent)
        _, errors = process.communicate()
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 1}[sent], errors
        if sent == signal.SIGINT:
            assert "continues from there" in errors and "Traceback" not in errors
    run("opd", **world | dict(steps=40, save_every=5, eval_every=0), out_dir=tmp_path / "cut")
    run("opd", **world | dict(steps=40, save_every=5, eval_every=0), out_dir=tmp_path / "whole")
    assert read_log(tmp_path / "cut") == read_log(tmp_path / "whole")


# ----------------------------------------------------------------------------------------------------------------
# Stored teacher prefixes


def test_teacher_prefixes_are_sampled_once_and_a_stale_store_is_remade(world, tmp_path, monkeypatch):
    import common

    sampled, sample = [], common.sample

    def spy(model, prompts, *args, **kwargs):
        sampled.extend(prompts if kwargs.get("stream") == "teacher" else [])
        return sample(model, prompts, *args, **kwargs)

    monkeypatch.setattr(common, "sample", spy)

    def count(script, name, **changes):
        sampled.clear()
        run(script, **world | dict(steps=6, eval_every=0) | changes, out_dir=tmp_path / name)
        return len(sampled)

    assert count("sft_offpolicy", "a") == 12  # 12 prompts, two epochs
    assert count("sft_offpolicy", "b", lr=1e-4, rollout_batch_size=2) == 0  # another run
    with monkeypatch.context() as patch:  # where another process misses one, this one samples along, and keeps nothing
        patch.setattr(common, "sum_over_processes", lambda n: n + 1)
        assert count("sft_offpolicy", "o") == 6
    assert read_log(tmp_path / "o") == read_log(tmp_path / "a")
    assert count("sft_offpolicy", "l", seed=5) == 12  # another seed: the teacher's answers vary with it
    assert count("offline_rl_distill", "c") == 0  # another script
    assert count("sft_offpolicy", "d", max_new_tokens=3) == 0  # a shorter training length
    assert 0 < count("sft_offpolicy", "e", max_new_tokens=9) <= 12  # longer: what ended before is kept
    assert count("sft_offpolicy", "f", temperature=0.7) == 12  # other sampling
    assert count("sft_offpolicy", "g", teacher_samples=2) == 12  # a second answer each
    assert count("sft_offpolicy", "p", instruction="Box it.") == 12  # other prompts
    other = make_checkpoint(tmp_path / "teacher", hidden=48, seed=9)
    assert count("sft_offpolicy", "h", teacher=other) == 12  # another teacher
    # ... and another teacher under the *old* path
    weights = Path(world["teacher"], "model.safetensors")
    old = weights.read_bytes()
    weights.write_bytes(Path(other, "model.safetensors").read_bytes())
    try:
        assert count("sft_offpolicy", "i") == 12
    finally:
        weights.write_bytes(old)
    # flops do not depend on what was found on disk
    assert count("sft_offpolicy", "k") == 0
    assert [r.get("flops") for r in read_log(tmp_path / "k")] == [r.get("flops") for r in read_log(tmp_path / "a")]
    # ... and a curriculum pays at its first stage for the whole responses that are sampled there
    ladder = dict(prefixes="teacher", held_out=1, h_min=0.0, max_new_tokens=9)
    count("curriculum", "m", lengths="2,9", **ladder)
    count("curriculum", "n", lengths="2", **ladder)
    first, alone = (read_log(tmp_path / name)[1]["flops"] for name in "mn")
    assert first > alone
    # ... also where another run has left shorter ones
    count("curriculum", "elsewhere/q", lengths="2", seed=8, **ladder | dict(max_new_tokens=2))
    count("curriculum", "elsewhere/r", lengths="2,9", seed=8, **ladder)
    count("curriculum", "afresh/r", lengths="2,9", seed=8, **ladder)
    logs = [read_log(tmp_path / place / "r") for place in ("elsewhere", "afresh")]
    assert [row.get("flops") for row in logs[0]] == [row.get("flops") for row in logs[1]]


def test_a_store_cut_short_by_a_kill_is_mended(world, tmp_path):
    run("sft_offpolicy", **world, out_dir=tmp_path / "a")
    (store,) = (tmp_path / "teacher_rollouts").iterdir()
    store.write_bytes(store.read_bytes()[:-9])
    run("sft_offpolicy", **world, out_dir=tmp_path / "b")
    run("sft_offpolicy", **world, out_dir=tmp_path / "c")
    logs = [read_log(tmp_path / name) for name in "abc"]
    assert logs[0] == logs[1] == logs[2]
    assert all(json.loads(line) for line in store.read_text().splitlines()[-1:])
