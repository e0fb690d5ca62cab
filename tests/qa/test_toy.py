"""The toy: three ordinary checkpoints and two data files, as good as docs/results.md says they are."""

import re
from functools import partial

import numpy as np
import pytest
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd
from common import evaluate, make_rollouts
from plumbing.data import load_problems
from plumbing.grading import grade
from plumbing.models import load_model, load_tokens
from toy import build

ARGS, IM_END = opd.Args(student=f"{ROOT}/toy/base_student", teacher=f"{ROOT}/toy/teacher"), build.ID["<|im_end|>"]


def test_the_models_are_what_docs_results_says_and_what_the_papers_effects_need():
    """Other draws: a student's accuracy over 1,024 responses scatters by .02."""
    problems, text = load_problems(f"{ROOT}/toy/eval.jsonl")[0], (ROOT / "docs/results.md").read_text(encoding="utf-8")
    tokens, found = load_tokens(ARGS, [("toy", problems, 96)]), {}
    for role, cells in re.findall(r"^\| `toy/(teacher|student|base_student)` +\|([^\n]*)\|$", text, re.M):
        m, _ = found[role] = evaluate(load_model(f"{ROOT}/toy/{role}", "fp32"), {"toy": problems}, tokens, ARGS)
        *accuracy, h, length = map(float, cells.split("|"))
        assert [m["eval_entropy"], m["eval_len"]] == pytest.approx([h, length], rel=0.06), role
        assert [m["avg_at_k"], m["pass_at_k"]] == pytest.approx(accuracy, abs=0.06), role
        assert m["eval_ended"] > 0.99, f"{role} finishes"
        assert role == "teacher" or 0.45 < m["avg_at_k"] < 0.6 and m["pass_at_k"] > 0.95, "it can, and slips"
    teacher, said = found["teacher"]
    assert teacher["avg_at_k"] > 0.98 and teacher["eval_entropy"] > 0.15, "right in many ways"
    assert len(found) == 3
    assert np.divide(*np.quantile([r["length"] for r in said], (0.99, 0.01))) > 2.5, "training length must matter"


def test_they_are_ordinary_checkpoints_and_the_base_student_ends_by_a_token_that_the_others_never_say():
    """Its p(<|im_end|>) after an answer is about 1e-11, as in a real pair."""
    log_p, text = {}, "<|im_start|>user\n3+8+5<|im_end|>\n<|im_start|>assistant\n=1+5=6\n=3+3=6\n####6"
    for role, end in (("teacher", "<|im_end|>"), ("student", "<|im_end|>"), ("base_student", "<|endoftext|>")):
        model, tokenizer = (kind.from_pretrained(ROOT / "toy" / role) for kind in (AutoModelForCausalLM, AutoTokenizer))
        assert model.num_parameters() < 1e6 and tokenizer.chat_template and tokenizer.eos_token == end
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert tokenizer.decode(ids[0]) == text, "decoding gives back the text"
        log_p[role] = model(ids).logits[0, -1].log_softmax(-1)[[IM_END, build.ID["<|endoftext|>"]]].tolist()
    (_, other), (same, never), (lost, own) = log_p.values()
    assert -30 < lost < -20 and own > -1.5 and other < -7 and never < -7 and same > -0.1


def test_the_data_are_right_and_disjoint_and_the_responses_are_the_teachers():
    train, evals = (load_problems(f"{ROOT}/toy/{name}.jsonl", needs="answer")[0] for name in ("train", "eval"))
    assert (len(train), len(evals), len({p.question for p in train + evals})) == (4096, 128, 4096 + 128)
    numbers = [[int(n) for n in p.question.split("+")] for p in train + evals]
    assert [(p.answer, p.level) for p in train + evals] == [(str(sum(n) % 10), str(len(n))) for n in numbers]
    tokens = load_tokens(ARGS, [("toy", train, 96)])
    asked = (f"user\n{p.question}<|im_end|>" in tokens.tokenizer.decode(p.prompt) for p in train)
    assert all(asked), "each has its own prompt, also those of the second thousand"
    assert all(p.ended == (p.response_ids[-1] == IM_END) for p in train) and sum(p.ended for p in train) > 4090
    assert tokens.tokenizer.unk_token_id not in {i for p in train for i in p.response_ids}
    assert 0.985 < np.mean([grade(p.response, p.answer) for p in train]) < 0.999
    batch = make_rollouts(*zip(*((p.prompt, p.response_ids, p.ended) for p in train[:256])), "cpu")
    logits = load_model(ARGS.teacher, "fp32")(batch.ids).logits[:, :-1]
    log_p = logits.log_softmax(-1).gather(-1, batch.ids[:, 1:, None])
    assert -log_p[batch.mask[:, 1:]].mean() == pytest.approx(0.288, abs=0.02), "H(p)"


def test_what_is_wrong_in_the_documents_is_not_learned():
    """A step adds up two neighbours, so the sum modulo 10 stays: unless a digit is wrong. The teacher answers what two
    lines agree on, and learns neither a wrong digit nor a hasty answer; the students compare lines, though not well."""
    rng, answers, masked, restated, wrong = np.random.default_rng(0), {True: [], False: []}, [], [], []
    base_response = partial(build.student_response, base=True)
    for _ in range(2000):
        numbers, documents = build.random_problem(rng), []
        for ids, learned in (respond(numbers, rng) for respond in (build.teacher_response, base_response)):
            words = [[*build.SPECIAL, *build.WORDS][i] for i in ids]
            documents.append((words, learned, [word[1] for word in words if word.endswith("\n")]))
        restated.append([words.count("####") - 1 for words, *_ in documents])
        (words, learned, results), (said, all_learned, compared) = documents
        agreed, place = {r for r in results if results.count(r) > 1}, 0
        for line in "".join(words[: words.index("####")]).split("\n")[:-1]:
            before = numbers
            for step in ([int(n) for n in step.split("+")] for step in line.split("=")[1:]):
                right = len(step) == len(before) - 1 and (sum(step) - sum(before)) % 10 == 0
                assert right or not all(learned[place : place + len(step)])
                before, place = step, place + len(step)
            wrong.append(sum(before) % 10 != sum(numbers) % 10)
        assert {b for a, b in zip(words, words[1:]) if a == "####"} <= (agreed or {results[-1]})
        assert learned[words.index("####")] == bool(agreed)
        assert (words[-1], said[-1]) == ("<|im_end|>", "<|endoftext|>") and learned[-1] and all(all_learned)
        masked.append(not all(learned))
        for m in range(2, len(compared) + 1):
            answers[len(set(compared[:m])) < m].append(m == len(compared))
    assert 0.3 < np.mean(masked) < 0.5 and 0.1 < np.mean(wrong) < 0.3 and 0.02 < np.mean(restated, 0)[0] < 0.045
    assert {agreed: np.mean(x) for agreed, x in answers.items()} == pytest.approx(build.STUDENT_ANSWERS, abs=0.04)
    assert np.mean(restated, 0)[1] == pytest.approx(build.BASE_RESTATES / (1 - build.BASE_RESTATES), abs=0.06)
    words = lambda ids: [[*build.SPECIAL, *build.WORDS][i] for i in ids]
    chat = [words(build.student_response(build.random_problem(rng), rng)[0]) for _ in range(100)]
    assert {(said.count("####"), said[-1]) for said in chat} == {(1, "<|im_end|>")}, "nothing artificial"
