"""The embedded default: two ordinary checkpoints and two data files, as good as docs/results.md says they are."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT

import opd
from common import evaluate
from plumbing.models import load_model, load_vocab
from plumbing.runs import parse
from plumbing.tasks import load_problems
from toy import build

TOY = ROOT / "toy"


QUESTION = "<|im_start|>user\n3+8+5<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def measured():
    args = parse(opd.Args, ["--student", str(TOY / "student"), "--teacher", str(TOY / "teacher")])
    problems = load_problems(str(TOY / "eval.jsonl"), needs_answer=True)
    models = {role: load_model(str(TOY / role), args) for role in ("teacher", "student")}
    return {role: evaluate(model, problems, *load_vocab(args, [problems]), args) for role, model in models.items()}


def test_teacher_and_student_are_as_good_as_docs_results_says(measured):
    rows = re.findall(r"^\| `toy/(teacher|student)` +\|([^\n]*)\|$", (ROOT / "docs" / "results.md").read_text(), re.M)
    stated = {role: list(map(float, cells.split("|"))) for role, cells in rows}
    columns = ("avg_at_k", "pass_at_k", "eval_entropy", "eval_len")
    found = {role: [metrics[name] for name in columns] for role, (metrics, _) in measured.items()}
    for role in ("teacher", "student"):  # equal on the machine that measured them; a draw may flip elsewhere
        assert found[role] == pytest.approx(stated[role], rel=0.03, abs=0.01), role


def test_the_world_has_what_the_paper_s_effects_need(measured):
    teacher, student = (measured[role][0] for role in ("teacher", "student"))
    assert teacher["avg_at_k"] > 0.97 and teacher["eval_entropy"] > 0.15, "right in many ways"
    assert 0.35 < student["avg_at_k"] < 0.6 and student["pass_at_k"] > 0.93, "it can, and slips"
    lengths = [r["length"] for r in measured["teacher"][1]]
    assert max(lengths) > 2.5 * min(lengths), "training length must matter"
    assert teacher["eval_clip_ratio"] < 0.01 and student["eval_clip_ratio"] < 0.03, "both end their answers"


def test_they_are_ordinary_checkpoints_and_each_ends_by_a_token_that_the_other_never_says():
    """After an answer: the student's p(<|im_end|>) is about 1e-11, as in a real pair; the teacher hardly says the other."""
    log_p = {}
    for role, end in (("teacher", "<|im_end|>"), ("student", "<|endoftext|>")):
        model = transformers.AutoModelForCausalLM.from_pretrained(TOY / role)
        tokenizer = transformers.AutoTokenizer.from_pretrained(TOY / role)
        assert model.num_parameters() < 1e6 and tokenizer.chat_template and tokenizer.eos_token == end
        assert tokenizer.decode(tokenizer(QUESTION)["input_ids"]) == QUESTION, "decoding gives back the text"
        ids = tokenizer(QUESTION + "=1+5=6\n=3+3=6\n####6", return_tensors="pt").input_ids
        with torch.no_grad():
            last = model(ids).logits[0, -1].log_softmax(-1)
        log_p[role] = last[tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])].tolist()
    assert -30 < log_p["student"][0] < -20 and log_p["student"][1] > -1.5
    assert log_p["teacher"][0] > -0.5 and log_p["teacher"][1] < -7
    assert sum(f.stat().st_size for f in TOY.rglob("*") if f.is_file()) < 5e6


def test_the_data_are_right_and_disjoint():
    rows = {name: [json.loads(line) for line in (TOY / f"{name}.jsonl").open()] for name in ("train", "eval")}
    problems = {name: [row["problem"] for row in rows[name]] for name in rows}
    assert len(set(problems["train"]) | set(problems["eval"])) == len(problems["train"]) + len(problems["eval"])
    for row in rows["train"] + rows["eval"]:
        assert sum(map(int, row["problem"].split("+"))) % 10 == int(row["answer"])


def documents(respond):
    """2,000 of build.py's: (the numbers asked for, words, what is learned, lines, their results)."""
    rng, names = np.random.default_rng(0), [*build.SPECIAL, *build.WORDS]
    for _ in range(2000):
        numbers = build.random_problem(rng)
        ids, learned = respond(numbers, rng)
        assert len(ids) == len(learned)
        words = [names[i] for i in ids]
        lines = "".join(words[: words.index("####")]).split("\n")[:-1]
        yield numbers, words, learned, lines, [line[-1] for line in lines]


def test_the_teacher_s_documents_teach_no_mistake():
    """Half of them have mistakes put in: what is learned is right, and the answer is what two lines agree on."""
    masked = restated = 0
    for numbers, words, learned, lines, results in documents(build.teacher_response):
        assert words[-1] == "<|im_end|>" and learned[-1]
        answers = {words[i + 1] for i, word in enumerate(words) if word == "####"}
        agreed = {r for r in results if results.count(r) > 1}
        assert len(answers) == 1 and (answers <= agreed if agreed else answers == {results[-1]})
        assert learned[words.index("####")] == (bool(agreed) or len(results) == build.MAX_LINES)
        assert 2 <= len(results) <= build.MAX_LINES
        place = 0
        for k, line in enumerate(lines):  # every learned digit follows from the step before it
            before = numbers
            assert len(set(results[:k])) == k or not learned[place], "a line too many is not learned to begin"
            for step in line[1:].split("="):
                after = list(map(int, step.split("+")))
                pairs = [before[:i] + [sum(before[i : i + 2]) % 10] + before[i + 2 :] for i in range(len(before) - 1)]
                wrong = [[j for j, (a, b) in enumerate(zip(after, pair)) if a != b] for pair in pairs]
                assert any(len(digits) <= 1 and not any(learned[place + j] for j in digits) for digits in wrong)
                before, place = after, place + len(after)
        masked += not all(learned)
        restated += words.count("####") > 1
    assert 0.3 < masked / 2000 < 0.5 and 0.02 < restated / 2000 < 0.045


def test_the_student_s_documents_slip_and_compare():
    said, answered, n = 0, Counter(), Counter()
    for _, words, learned, _, results in documents(build.student_response):
        assert all(learned) and words[-1] == "<|endoftext|>"
        for m in range(2, len(results) + 1):
            agree = len(set(results[:m])) < m
            n[agree] += 1
            answered[agree] += m == len(results)
        said += words.count("####") - 1
    for agree, share in build.STUDENT_ANSWERS.items():
        assert answered[agree] / n[agree] == pytest.approx(share, abs=0.04)
    assert said / 2000 == pytest.approx(build.STUDENT_RESTATES / (1 - build.STUDENT_RESTATES), abs=0.06)
