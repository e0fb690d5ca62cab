"""The embedded default: two ordinary checkpoints and two data files, as good as README.md says they are."""

import json
import re

import pytest
import torch
import transformers
from conftest import ROOT

import opd
from common import evaluate
from plumbing.models import load_model, load_vocab
from plumbing.runs import parse
from plumbing.tasks import grade, load_problems

TOY = ROOT / "toy"
COLUMNS = ("avg_at_k", "pass_at_k", "eval_entropy", "eval_len")


def stated():
    """README's table of the two models: {role: {metric: number}}."""
    rows = re.findall(r"^\| `toy/(teacher|student)` +\|([^\n]*)\|$", (ROOT / "README.md").read_text(), re.M)
    return {role: dict(zip(COLUMNS, map(float, cells.split("|")), strict=True)) for role, cells in rows}


@pytest.fixture(scope="module")
def measured():
    args = parse(opd.Args, ["--student", str(TOY / "student"), "--teacher", str(TOY / "teacher")])
    problems = load_problems(str(TOY / "eval.jsonl"), needs_answer=True)
    vocab, tokenizer = load_vocab(args, [problems])
    return {
        role: evaluate(load_model(str(TOY / role), args), problems, vocab, tokenizer, args)
        for role in ("teacher", "student")
    }


def test_teacher_and_student_are_as_good_as_readme_says(measured):
    for role, numbers in stated().items():
        for name, number in numbers.items():  # equal on the machine that measured them; a draw may flip elsewhere
            assert measured[role][0][name] == pytest.approx(number, rel=0.03, abs=0.01), (role, name)


def test_the_world_has_what_the_paper_s_effects_need(measured):
    teacher, student = (measured[role][0] for role in ("teacher", "student"))
    assert teacher["avg_at_k"] > 0.97 and teacher["eval_entropy"] > 0.15, "right in many ways"
    assert 0.35 < student["avg_at_k"] < 0.6 and student["pass_at_k"] > 0.93, "it can, and slips"
    lengths = [r["length"] for r in measured["teacher"][1]]
    assert max(lengths) > 2.5 * min(lengths), "training length must matter"
    assert teacher["eval_clip_ratio"] < 0.01 and student["eval_clip_ratio"] < 0.03, "both end their answers"


def test_each_ends_by_a_token_that_the_other_never_says(measured):
    """After an answer: the student's p(<|im_end|>) is about the paper's 1e-11; the teacher hardly says the other."""
    log_p, both = {}, ("<|im_end|>", "<|endoftext|>")
    for role in ("teacher", "student"):
        model = transformers.AutoModelForCausalLM.from_pretrained(TOY / role)
        tokenizer = transformers.AutoTokenizer.from_pretrained(TOY / role)
        text = "<|im_start|>user\n3+8+5<|im_end|>\n<|im_start|>assistant\n=1+5=6\n=3+3=6\n####6"
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            ends = model(ids).logits[0, -1].log_softmax(-1)
        log_p[role] = {end: ends[tokenizer.convert_tokens_to_ids(end)].item() for end in both}
    assert -30 < log_p["student"]["<|im_end|>"] < -20 and log_p["student"]["<|endoftext|>"] > -1.5
    assert log_p["teacher"]["<|endoftext|>"] < -7 and log_p["teacher"]["<|im_end|>"] > -0.5


def test_they_are_ordinary_checkpoints_that_end_differently():
    ends = {}
    for role in ("teacher", "student"):
        model = transformers.AutoModelForCausalLM.from_pretrained(TOY / role)
        tokenizer = transformers.AutoTokenizer.from_pretrained(TOY / role)
        assert model.num_parameters() < 1e6 and tokenizer.chat_template
        ends[role] = tokenizer.eos_token
        text = "<|im_start|>user\n3+8+5<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text, "decoding gives back the text"
    assert ends == {"teacher": "<|im_end|>", "student": "<|endoftext|>"}
    assert sum(f.stat().st_size for f in TOY.rglob("*") if f.is_file()) < 5e6


def test_the_data_are_right_and_disjoint():
    rows = {name: [json.loads(line) for line in (TOY / f"{name}.jsonl").open()] for name in ("train", "eval")}
    problems = {name: [row["problem"] for row in rows[name]] for name in rows}
    assert len(set(problems["train"]) | set(problems["eval"])) == len(problems["train"]) + len(problems["eval"])
    for row in rows["train"] + rows["eval"]:
        assert sum(map(int, row["problem"].split("+"))) % 10 == int(row["answer"])
        assert grade(f"=...####{row['answer']}", row["answer"]) and not grade(
            f"####{row['answer']}\n####x", row["answer"]
        )
