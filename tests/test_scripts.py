"""The training scripts as wholes: they differ in the idea alone, do what they say, and keep their contracts."""

import ast
import dataclasses
import difflib
import importlib
import io
import json
import os
import re
import shutil
import sys

import pytest
import torch
import transformers
from conftest import DISTILLATION, ROOT, SCRIPTS, arguments_of, argv, even_length, read_log, run, write_jsonl

import evaluate
import grpo
import opd
import plumbing.run
from plumbing.arguments import parse
from plumbing.models import sequence_flops
from plumbing.run import Run, checkpoints, say

CORNERS = ["sft_offpolicy", "offline_rl_distill", "dagger_onpolicy", "opd"]
SIBLINGS = [*CORNERS, "kl_mix"]
FORWARD, REVERSE, MIXED = (
    "divergence = {'exact': KL_kl, 'sampled': sampled_KL_kl}[args.estimator]".replace("KL", kl)
    for kl in ("forward", "reverse", "mixed")
)
IMPORTS = "from common import check_models, distillation_loss, evaluate, "
OPD = "-" + IMPORTS + "reverse_kl, sample, sampled_reverse_kl, seed_of"
FROM_DATA = ["-run = Run(args)", "+run = Run(args, needs='response')"]
PREFIXES = [
    "-sampling = dict(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, prompt_len=run.prompt_len)",
    "-batch, seed = (run.batch(step), seed_of(args.seed, 'rollouts', step))",
    "-rollouts = sample(sampler, batch.prompts, max_new_tokens=args.max_new_tokens, seed=seed, **sampling, **tokens)",
    "+batch = run.batch(step)",
    "+rollouts = teacher_rollouts(teacher, batch, args.max_new_tokens)",
]
KL, MIX = ["-" + REVERSE, "+" + FORWARD], MIXED.replace("= {", "= partial({") + ", lam=args.lam)"
DIFFS = {  # from opd.py to ...
    "dagger_onpolicy": [OPD, "+" + IMPORTS + "forward_kl, sample, sampled_forward_kl, seed_of", *KL],
    "offline_rl_distill": [OPD, "+" + IMPORTS + "reverse_kl, sampled_reverse_kl, seed_of, teacher_rollouts"]
    + [*FROM_DATA, *PREFIXES],
    "sft_offpolicy": [OPD, "+" + IMPORTS + "forward_kl, sampled_forward_kl, seed_of, teacher_rollouts"]
    + [*FROM_DATA, *KL, *PREFIXES],
    "kl_mix": ["+from functools import partial", OPD, "+" + IMPORTS + "mixed_kl, sample, sampled_mixed_kl, seed_of"]
    + ["+lam: float = 0.2", KL[0], "+" + MIX],
}


def code_lines(script):
    """A script's code without docstring and comments, one statement or field a line."""
    tree = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))
    return [line.strip() for line in ast.unparse(tree.body[1:]).splitlines()]


@pytest.mark.parametrize("other", DIFFS)
def test_siblings_differ_in_the_idea_and_nothing_else(other):
    diff = difflib.unified_diff(code_lines("opd"), code_lines(other), n=0, lineterm="")
    assert [line for line in diff if line[:2] not in ("--", "++", "@@")] == DIFFS[other]


@pytest.mark.parametrize("script", SIBLINGS)
def test_a_script_can_be_read_at_one_sitting_and_its_table_marks_it(script):
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 112 and max(map(len, text.splitlines())) <= 120
    table = re.findall(r"^ +(\w+) prefixes +(.*)$", ast.get_docstring(ast.parse(text)), re.M)
    assert re.findall(r"(\w+)\.py *<-", str(table)) == [script]
    if script in CORNERS:
        cells = [(source, re.findall(r"(\w+)\.py", files)) for source, files in table]
        assert cells == [("teacher", CORNERS[:2]), ("student", CORNERS[2:])]
        assert re.search(r"forward KL\(p‖q_θ\) +reverse KL\(q_θ‖p\)\n", text), "in this order of columns"


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def prompt_of(tokenizer, question):
    options = dict(add_generation_prompt=True, enable_thinking=False, tokenize=False)
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], **options)
    return tokenizer(text)["input_ids"]


def rows_of(world):
    return [json.loads(line) for line in open(world["data"], encoding="utf-8")]


class SGD(torch.optim.SGD):
    """What stands in for AdamW, which hides the gradient's scale and blows rounding up."""

    def __init__(self, params, lr, weight_decay, fused):
        assert weight_decay == 0
        super().__init__(params, lr=lr)


@pytest.mark.parametrize(
    "script, prefixes, lam",
    [("sft_offpolicy", "teacher", 0), ("offline_rl_distill", "teacher", 1), ("dagger_onpolicy", "student", 0)]
    + [("opd", "student", 1), ("kl_mix", "student", 0.2)],
)
def test_a_run_is_the_loop_that_one_would_write_down(script, prefixes, lam, world, tmp_path, monkeypatch):
    """Three steps on all of the data: full logits, one response at a time, KLs by their definition, a mean over all
    tokens, clipping, warm-up, SGD. The run has micro-batches of 3 and 3 responses; a mean of their means is another."""
    more = dict(steps=3, batch_size=6, max_new_tokens=9, top_k=1, lr=1.0, warmup_steps=2, max_grad_norm=0.5)
    monkeypatch.setattr(torch.optim, "AdamW", SGD)
    rows = rows_of(world)[:6]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    run(script, **world | more | dict(data=data, eval_data="none"), out_dir=tmp_path / "run")

    student, teacher = load(world["student"]), load(world["teacher"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(world["teacher"])
    ends = {tokenizer.convert_tokens_to_ids("<|endoftext|>"), *teacher.config.eos_token_id}
    for logged, lr in zip(read_log(tmp_path / "run")[1:], (0.5, 1.0, 1.0), strict=True):
        total = n = ended = 0
        for row in rows:
            prompt = prompt_of(tokenizer, row["question"])
            response = tokenizer(row["response"])["input_ids"] + [tokenizer.eos_token_id]
            if prefixes == "student":  # with --top_k 1 its most likely tokens
                response = []
                while len(response) < 9 and (not response or response[-1] not in ends):
                    response.append(student(torch.tensor([prompt + response])).logits[0, -1].argmax().item())
            ended, response = ended + (len(response) <= 9 and response[-1] in ends), response[:9]
            ids = torch.tensor([prompt + response])
            log_q, log_p = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (student, teacher))
            forward, reverse = (log_p.exp() * (log_p - log_q)).sum(), (log_q.exp() * (log_q - log_p)).sum()
            total, n = total + lam * reverse + (1 - lam) * forward, n + len(response)
        grads = torch.autograd.grad(total / n, list(student.parameters()))
        norm = sum(g.square().sum() for g in grads).sqrt()
        expected = dict(loss=(total / n).item(), grad_norm=norm.item(), lr=lr, response_len=n / 6, ended=ended / 6)
        assert {key: logged[key] for key in expected} == pytest.approx(expected, rel=1e-4)
        with torch.no_grad():
            for p, g in zip(student.parameters(), grads):
                p -= lr * min(1, 0.5 / norm) * g
    for p, expected in zip(load(tmp_path / "run/model").parameters(), student.parameters()):
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ends", ["apart", "as_one"])
@pytest.mark.parametrize("script", DISTILLATION)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(script, ends, world, tmp_path):
    """... at any temperature: that changes the prefixes, while the loss compares the distributions at T = 1."""
    more = dict(student=world["teacher"], ends=ends, temperature=2.0, top_k=7, steps=1, lengths=6)
    same = arguments_of(script, world, **more)
    run(script, **same | dict(eval_data="none"), out_dir=tmp_path / "run")
    assert all(abs(row["loss"]) < 1e-6 and row["grad_norm"] < 1e-4 for row in read_log(tmp_path / "run")[1:])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_step_draws_other_numbers(script, world, tmp_path, monkeypatch):
    """A student that stands still is asked the same thing in every step. On teacher prefixes the loss draws."""
    monkeypatch.setattr(grpo, "grade", even_length)
    estimator = "sampled" if script in CORNERS[:2] else "exact"
    data = write_jsonl(tmp_path / "data.jsonl", rows_of(world)[:1] * 3)
    more = dict(data=data, eval_data="none", lr=1e-20, estimator=estimator)
    run(script, **arguments_of(script, world, **more, lengths=6), out_dir=tmp_path / "run")
    assert len({(row["loss"], row["entropy"]) for row in read_log(tmp_path / "run")[1:]}) == 3


def test_every_epoch_is_a_new_permutation_and_processes_share_it(world, tmp_path, monkeypatch):
    opened = Run(parse(opd.Args, argv(world | dict(batch_size=8, out_dir=tmp_path / "run"))))
    batches = [opened.batch(step) for step in range(6)]  # four epochs of 12 prompts; every other batch spans two
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    epochs = {tuple(prompts[i : i + 12]) for i in range(0, 48, 12)}
    assert len(epochs) == 4 and all(len(set(epoch)) == 12 for epoch in epochs)
    assert [new for batch in batches for new in batch.first_use] == [True] * 12 + [False] * 36
    for rank in (0, 1):
        monkeypatch.setattr(plumbing.run, "rank_and_world", lambda rank=rank: (rank, 2))
        assert [opened.batch(step).prompts for step in range(6)] == [batch.prompts[rank::2] for batch in batches]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_leaves_what_its_contract_says(script, world, tmp_path, curves):
    out = tmp_path / "run"
    run(script, **arguments_of(script, world, estimator="sampled", eval_every=2), out_dir=out)
    files = "args.json checkpoint-3 curves.png log.jsonl model responses-0.jsonl responses-2.jsonl responses-3.jsonl"
    assert sorted(path.name for path in out.iterdir()) == files.split()
    rows = read_log(out, times=True)
    every = {"step", "loss", "entropy", "response_len", "ended", "grad_norm", "lr", "tokens_per_s", "seconds", "flops"}
    measured = {"avg_at_k", "pass_at_k", "eval_len", "eval_ended", "eval_marked", "eval_useful"}
    evaluated = measured | {f"{name}_ci" for name in measured} | {"eval_entropy", "problems"}
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and set(rows[0]) == evaluated | {"step"}
    own = {"curriculum": {"train_len", "gate_entropy", "gate_open"}, "grpo": {"reward"}}
    for row in rows[1:]:
        assert set(row) == every | own.get(script, set()) | (evaluated if row["step"] > 1 else set())
    assert rows[1]["seconds"] < rows[3]["seconds"] and rows[1]["flops"] < rows[3]["flops"], "they add up"
    said = json.loads(open(out / "responses-2.jsonl", encoding="utf-8").readline())
    assert {"prompt", "answer", "response", "response_ids", "correct", "ended", "length"} <= set(said)
    saved, fields = json.loads((out / "args.json").read_text(encoding="utf-8")), importlib.import_module(script).Args
    names = {field.name for field in dataclasses.fields(fields)}
    assert names <= set(saved) and len(names) == {"kl_mix": 32, "curriculum": 38}.get(script, 31)
    assert saved.get("estimator", "sampled") == "sampled"
    for path in (out / "model", out / "checkpoint-3"):
        tokenizer, model = transformers.AutoTokenizer.from_pretrained(path), load(path)
        assert tokenizer.chat_template and model.config.vocab_size == len(tokenizer)
        ends = {300} if script == "grpo" else {300, 302, *range(100, 124)}
        assert set(model.generation_config.eos_token_id) == ends, "it stops where its rollouts did"


def test_teacher_prefixes_are_the_responses_in_the_data(world, tmp_path, capsys):
    """Text and token ids give the same run. A text gets the end token unless its row says `ended: false`. What is cut
    has not finished. The teacher's FLOPs are those of the whole response, when it is used for the first time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(world["teacher"])
    texts = [row | {"ended": i % 3 > 0} for i, row in enumerate(rows_of(world))]
    ids = [tokenizer(row["response"])["input_ids"] + [tokenizer.eos_token_id] * row["ended"] for row in texts]
    none = [{"question": "What?"}, {"question": "What?", "response": None}, {"question": "What?", "response": ""}]
    more = dict(steps=2, batch_size=12, max_new_tokens=9, eval_data="none", held_out=0)
    for name, rows in (
        ("text", texts + none),
        ("ids", [row | {"response": "other", "response_ids": y} for row, y in zip(texts, ids)]),
    ):
        data = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        run("sft_offpolicy", **arguments_of("sft_offpolicy", world, **more, data=data), out_dir=tmp_path / name)
        said = capsys.readouterr().out
        assert ("left out 3 rows without a response" in said) == (name == "text")
        assert f"{sum(len(y) > 9 for y in ids)} of 12 responses are longer than --max_new_tokens" in said
    first, second = read_log(tmp_path / "text")[1:]
    assert [first, second] == read_log(tmp_path / "ids")[1:]
    assert first["response_len"] == pytest.approx(sum(min(9, len(y)) for y in ids) / 12)
    assert first["ended"] == pytest.approx(sum(row["ended"] and len(y) <= 9 for row, y in zip(texts, ids)) / 12)
    prompts = [prompt_of(tokenizer, row["question"]) for row in texts]
    sampling = sequence_flops(load(world["teacher"]), *(torch.tensor(list(map(len, x))) for x in (ids, prompts)))
    assert first["flops"] - (second["flops"] - first["flops"]) == pytest.approx(sampling)


def test_evaluate_makes_the_responses_that_training_asks_for(world, tmp_path, monkeypatch, capsys):
    """A file without responses is refused before any model is loaded, with the command that makes them. Killed, it goes
    on to exactly the same file, which is --data as it stands, but not where anything else was asked for."""
    rows = [{"question": f"Add {i}" + "\u2028" * (i == 1) + " and 1"} for i in range(7)]  # a line's end, for some
    data = write_jsonl(tmp_path / "prompts.jsonl", rows)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as refused:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
        run("sft_offpolicy", **world | {"data": data}, out_dir=tmp_path / "run")
    command = re.search(r"`python evaluate.py (.*?)`", refused.value.code)[1].replace("TEACHER", world["teacher"])

    def make(name, *more):
        words = [*command.replace("FILE", str(tmp_path / name)).split(), "--eval_max_new_tokens", "6"]
        evaluate.main(parse(evaluate.Args, [*words, "--eval_batch_size", "2", *more]))
        return (tmp_path / name).read_bytes()

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        original, calls = evaluate.respond, iter((0, 0, 1))
        patch.setattr(evaluate, "respond", lambda *a, **k: original(*a, **k) if next(calls) == 0 else 1 / 0)
        make("cut.jsonl")
    assert make("cut.jsonl") == make("whole.jsonl") == make("whole.jsonl")
    other = write_jsonl(tmp_path / "other.jsonl", [{"question": "What?"}] * 7)
    for name, value in dict(seed=1, instruction="Box it.", eval_k=2, eval_temperature=0.5, eval_data=other).items():
        called = dict(eval_k="n", eval_temperature="temperature").get(name, name)
        with pytest.raises(SystemExit, match=f"made with another {called}: "):
            make("whole.jsonl", f"--{name}", str(value))
    capsys.readouterr()
    for more, warnings in ((dict(seed=1, max_new_tokens=5), 0), (dict(instruction="Box it."), 1)):
        more |= dict(data=tmp_path / "whole.jsonl", eval_data="none", out_dir=tmp_path / f"run-{warnings}")
        run("sft_offpolicy", **world | more)
        assert len(re.findall(r"^warning: .*--\w", capsys.readouterr().out, re.M)) == warnings
    made = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["prompt"] for row in made] == [row["question"] for row in rows]


def test_checkpoints_are_kept_on_demand_and_are_ordinary_ones(world, tmp_path, capsys):
    """evaluate.py, look.py and another run take any. A run that goes on with other files says so, a line for each."""
    teacher, data, out = tmp_path / "teacher", tmp_path / "data.jsonl", str(tmp_path / "run")
    shutil.copytree(world["teacher"], teacher)
    shutil.copy(world["data"], data)
    arguments = world | dict(teacher=teacher, data=data, out_dir=out, save_every=1, keep_checkpoints=True)
    run("opd", **arguments)
    few = dict(eval_data=world["eval_data"], eval_max_new_tokens=4)
    run("evaluate", model=f"{out}/checkpoint-1", **few)
    run("look", student=f"{out}/checkpoint-2", teacher=teacher, **few)
    run("sft_offpolicy", **world | dict(student=f"{out}/checkpoint-1", out_dir=tmp_path / "next"))
    capsys.readouterr()
    data.write_text(data.read_text(encoding="utf-8").replace("Tom", "Tim"), encoding="utf-8")
    os.utime(teacher / "model.safetensors", (0, 0))
    run("opd", **arguments | dict(steps=4))
    said = [line for line in capsys.readouterr().out.splitlines() if "changed since" in line]
    assert len(said) == 2 and "teacher" in said[0] + said[1] and "data" in said[0] + said[1]
    assert sorted(checkpoints(out)) == [1, 2, 3, 4]


def test_what_a_run_says_is_not_kept_back_by_a_pipe(monkeypatch):
    """... such as `| tee log`: that it is about to stop, above all."""
    written = io.BytesIO()
    for name in ("stdout", "stderr"):  # as Python has them where there is no terminal
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, "utf-8", line_buffering=name == "stderr"))
    say("stopping")
    assert b"stopping" in written.getvalue()
