"""evaluate.py and compare.py: the numbers of a run again, from outside, and what is drawn from them."""

import concurrent.futures
import importlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from conftest import arguments_of, draw_curves, read_log, run, write_jsonl
from matplotlib.axes import Axes

import compare
from common import summarize
from plumbing.runs import parse, pool, read_lines
from plumbing.tasks import load_evals
from toy import findings


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """Two finished runs of different seeds."""
    root = tmp_path_factory.mktemp("finished")
    for seed in (0, 1):
        run("opd", **world, seed=seed, eval_every=1, out_dir=root / f"seed-{seed}")
    return root


def evaluated(world, capsys, model, **more):
    """What evaluate.py prints, and the numbers in its table."""
    run("evaluate", model=model, eval_data=world["eval_data"], eval_k=2, **more)
    printed = capsys.readouterr().out
    cells = printed.splitlines()[2].split("|")[2:-1]
    return printed, [float(cell.split("±")[0].strip(" %")) for cell in cells]


def test_evaluate_gives_the_numbers_of_the_training_log(world, finished, tmp_path, capsys):
    more = dict(eval_max_new_tokens=6, eval_batch_size=2, out_file=tmp_path / "all.jsonl")
    _, numbers = evaluated(world, capsys, finished / "seed-0/model", **more)
    expected = read_log(finished / "seed-0")[-1]
    problems, avg, passed, length, cut, marked, entropy = numbers
    assert (problems, avg, passed) == (3, round(expected["avg_at_k"], 3), round(expected["pass_at_k"], 3))
    assert (length, entropy) == (round(expected["eval_len"], 1), round(expected["eval_entropy"], 3))
    rows = [json.loads(line) for line in Path(tmp_path, "all.jsonl").read_text().splitlines()]
    of_run = read_lines(finished / f"seed-0/responses-{expected['step']}.jsonl")
    assert [row.pop("nats") for row in rows] == pytest.approx([row.pop("nats") for row in of_run]) and rows == of_run
    assert [path.name for path in tmp_path.iterdir()] == ["all.jsonl"]
    assert len(rows) == 6 and {"prompt", "response", "answer", "correct", "length", "ended"} <= set(rows[0])


def test_a_file_that_cannot_be_written_is_said_before_a_model_loads(world, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.load_model", None)
    for path in (tmp_path / "nowhere" / "all.jsonl", tmp_path):
        with pytest.raises(SystemExit, match="must be a file in a folder that is there"):
            run("evaluate", model=world["student"], eval_data=world["eval_data"], out_file=path)


def test_what_was_sampled_is_printed_even_where_it_cannot_be_written(world, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError("no room")

    monkeypatch.setattr(importlib.import_module("evaluate"), "write_file", full)
    with pytest.raises(OSError, match="no room"):
        evaluated(world, capsys, world["student"], eval_max_new_tokens=2, out_file=tmp_path / "all.jsonl")
    assert "Avg@2" in capsys.readouterr().out


def test_levels_are_in_order_of_difficulty(world, tmp_path, capsys):
    rows = [dict(question=f"{level} is how many?", answer="1", level=level) for level in (10, 9, 2)]
    path = write_jsonl(tmp_path / "levels.jsonl", rows)
    run("evaluate", model=world["student"], eval_data=path, eval_k=1, eval_max_new_tokens=2)
    lines = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if "  level" in line]
    assert lines == ["level 2", "level 9", "level 10"]


def test_metrics_worked_out_by_hand():
    """Two problems, four samples: 1 of 4 and 4 of 4 right. Avg@2 = .625; Pass@2 = (1 − C(3,2)/C(4,2) + 1)/2 = .75."""
    records = [
        dict(problem=p, sample=j, correct=right, length=10 + j, ended=j > 0, marked=j > 2, nats=(10 + j) * 0.5)
        for p, rights in ((0, [1, 0, 0, 0]), (1, [1, 1, 1, 1]))
        for j, right in enumerate(rights)
    ]
    m = summarize(records, [0, 1], k=2)
    assert m["avg_at_k"] == 0.625 and m["pass_at_k"] == 0.75 and m["eval_len"] == 11.5
    assert m["eval_clip_ratio"] == 0.25 and m["eval_entropy"] == 0.5 and m["eval_marked"] == 0.25
    assert m["avg_at_k_ci"] == pytest.approx(1.96 * (0.75 / 2**0.5) / 2**0.5)
    assert summarize(records, [1], k=2)["avg_at_k"] == 1.0, "a subset of the problems, as for a difficulty level"


def test_several_sets_are_pooled_by_the_formula_of_a_mean():
    """Half-widths of .18, .15, .04 and .03 give .06, and not their mean, .10; and every set counts alike."""
    sets = [(0, 0.18, 30), (0.2, 0.15, 40), (0.4, 0.04, 500), (0.6, 0.03, 1319)]
    m = pool([dict(avg_at_k=avg, avg_at_k_ci=ci, pass_at_k_ci=ci, problems=n) for avg, ci, n in sets])
    assert m["avg_at_k"] == pytest.approx(0.3) and m["problems"] == 1889
    assert m["avg_at_k_ci"] == pytest.approx((0.18**2 + 0.15**2 + 0.04**2 + 0.03**2) ** 0.5 / 4)


def test_a_subset_is_spread_over_the_set(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": i} for i in range(10)])
    taken = lambda n: [p.answer for p in load_evals(path, n)[path]]  # noqa: E731
    assert taken(4) == ["0", "2", "5", "7"] and len(taken(0)) == len(taken(99)) == 10


def test_answers_without_a_mark_are_wrong_said_so_and_can_be_read_all_the_same(world, tmp_path, monkeypatch, capsys):
    """A model that says 1 to every question; 1 is right for one of three."""
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "decode", lambda self, ids, **_: "so it is 1 apple")
    for grading, share in (("marked", 0.0), ("last_number", 0.333)):
        out, numbers = evaluated(world, capsys, world["student"], eval_max_new_tokens=4, grade=grading)
        assert (numbers[1], numbers[5]) == (share, 0.0)
        assert "only 0% of the responses mark an answer" in out and "--instruction" in out
        assert ("by their last number" in out) == (grading == "last_number")


def test_curves_show_what_the_log_has(finished, tmp_path, monkeypatch):
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *a, label, **more: drawn.append(label) or plot(*a, label=label, **more))
    draw_curves(shutil.copytree(finished / "seed-0", tmp_path / "cost_$5_lr_$6"))  # which is no mathematics
    assert drawn == ["loss", "entropy", "eval_entropy", "response_len", "eval_len", "avg_at_k", "pass_at_k"]


def test_compare_draws_runs_together_and_says_if_they_are_unlike(finished, tmp_path, monkeypatch, capsys):
    other = shutil.copytree(finished / "seed-1", tmp_path / "other")
    args = json.loads((other / "args.json").read_text()) | {"eval_k": 4, "eval_batch_size": 3}
    (other / "args.json").write_text(json.dumps(args))
    for second, warned in ((finished / "seed-1", False), (other, True)):
        dirs = [str(finished / "seed-0"), str(second)]
        words = ["--dirs", *dirs, "--out_dir", str(tmp_path)]
        compare.main(parse(compare.Args, words))
        assert ("not evaluated alike: they differ in --eval_k\n" in capsys.readouterr().out) == warned
    assert (tmp_path / "together.png").stat().st_size > 5000
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    for path, row in zip(dirs, rows, strict=True):
        assert row[0] == f"| {path}" and row[5] == f"{read_log(path)[-1]['eval_entropy']:.3f}"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="without torchrun"):
        compare.main(parse(compare.Args, words))


def test_intervals_over_seeds_are_t_intervals():
    mean, ci = compare.mean_ci([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0 and ci == pytest.approx(2.776 * 2.5**0.5 / 5**0.5, rel=2e-3)
    tables = {1: 12.706, 2: 4.303, 4: 2.776, 5: 2.571, 8: 2.306, 9: 2.262, 10: 2.228, 15: 2.131, 30: 2.042, 120: 1.980}
    assert {n: compare.t_quantile(n) for n in tables} == pytest.approx(tables, rel=2e-3)


def made_up(lasts, firsts):
    """Seeds of a run of 4 FLOPs, from Avg@8 .2 to each of lasts; by the first answers of its responses to firsts."""
    ends = [dict(avg_at_k=last, first_avg=first, eval_entropy=0.1) for last, first in zip(lasts, firsts)]
    return [[{"flops": 0.0, "avg_at_k": 0.2}, {"flops": 4.0} | end] for end in ends]


def test_findings_by_the_last_and_by_the_first_answer(tmp_path, monkeypatch):
    """A run that loops: wrong in its last answer, right in its first one. The verdict follows from which one counts,
    from the sign that is claimed, from the interval in the first world, and from the sign in the other one."""
    of_a = {"one": made_up([0.2, 0.25, 0.3], [0.8, 0.85, 0.95]), "two": made_up([0.6], [0.9])}
    worlds = {name: {"a": seeds, "b": made_up([0.5] * 3, [0.5] * 3)[: len(seeds)]} for name, seeds in of_a.items()}
    claims = [
        ("axis", "a is better", +1, lambda v: v("a") - v("b")),
        ("axis", "b is better", -1, lambda v: v("a") - v("b")),
        ("axis", "a is at .3", -1, lambda v: v("a") - 0.3),
        ("axis", "a is less sure", +1, lambda v: v("a", "eval_entropy")),
        ("axis", "at equal FLOPs", +1, lambda v: v("a", "avg_at_k", [4.0, 4.0, 2.0]) - v("b")),
    ]
    monkeypatch.setattr(findings, "claims", lambda args: claims)
    lines = compare.write_findings(worlds, compare.Args(out_dir=str(tmp_path))).splitlines()
    assert [line.split(" | ")[1:] for line in lines if line.startswith("| axis")] == [
        ["a is better (+)", "-0.250 ± 0.124", "+0.100", "the opposite in 1 of 2 |"],
        ["b is better (−)", "-0.250 ± 0.124", "+0.100", "found in 1 of 2 |"],
        ["a is at .3 (−)", "-0.050 ± 0.124", "+0.300", "not found |"],
        ["a is less sure (+)", "+0.100 ± 0.000", "+0.100", "found |"],
        ["at equal FLOPs (+)", "-0.267 ± 0.072", "+0.100", "the opposite in 1 of 2 |"],
        ["a is better (+)", "+0.367 ± 0.190", "+0.400", "found |"],
        ["b is better (−)", "+0.367 ± 0.190", "+0.400", "the opposite |"],
        ["a is at .3 (−)", "+0.567 ± 0.190", "+0.600", "the opposite |"],
    ]


class InProcess(concurrent.futures.Executor):
    """A pool that runs jobs where it stands: a spawned worker would import torch anew for seconds."""

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        future.set_result(function(*args))
        return future


def test_compare_runs_what_is_missing_and_only_that(world, tmp_path, monkeypatch):
    """The whole of it in miniature: plan, runs, tables and figures; the second time nothing runs."""
    real = findings.plan
    small = world | dict(steps=2, batch_size=2, lengths="2,8", eval_every=0)
    variants = "same-end", "untied"

    def make_variants(world, out_dir):
        for name in variants:
            shutil.copytree(small["student"], Path(out_dir, name, "model"), dirs_exist_ok=True)

    def plan(args, place):
        runs = real(args, place)
        for name, (script, arguments) in runs.items():
            start = arguments["student"] if arguments["student"] in {*runs, *variants} else small["student"]
            runs[name] = (script, arguments | arguments_of(script, small, student=start))
        return runs

    monkeypatch.setattr(findings, "plan", plan)
    monkeypatch.setattr(findings, "make_variants", make_variants)
    monkeypatch.setattr(compare.concurrent.futures, "ProcessPoolExecutor", lambda *args, **options: InProcess())
    argv = f"--out_dir {tmp_path} --worlds toy --seeds 1 --steps 4 --rl_steps 1 --short 2 --length 9"
    args = parse(compare.Args, argv.split())
    compare.main(args)
    figures = {f"{name}.png" for name in findings.figures(args)}
    assert len(figures) == 7 and figures <= {p.name for p in tmp_path.iterdir()}
    by_last, by_first = (tmp_path / "findings.md").read_text().split("\n\n")
    assert len(by_last.splitlines()) == 2 + len(findings.claims(args)) == 2 + 16
    assert len(by_first.splitlines()) == 2 + 9, "claims about final accuracy"
    assert by_last.count("| one seed |") == 16
    assert sorted(Counter(axis for axis, *_ in findings.claims(args)).values()) == [2] * 6 + [4], "as results.md counts"
    table = (tmp_path / "table.md").read_text()
    runs = real(args, "toy")
    assert all(f"| {name} | 1 | " in table for name in runs) and table.count("| curriculum-no-gate | ") == 2
    numbers = json.loads((tmp_path / "results.json").read_text())
    assert list(numbers) == ["toy"] and list(numbers["toy"]) == list(runs)
    last, log = numbers["toy"]["opd"][0][-1], read_log(tmp_path / "toy/opd-seed-0")[-1]
    assert last["step"] == log["step"] and last["avg_at_k"] == pytest.approx(log["avg_at_k"], rel=1e-4)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*/*")}
    compare.run_all(args, "toy", 1)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*/*")}
    assert len(before) > 3 * len(runs)


@pytest.mark.parametrize(
    "words, says",
    [
        ("--seeds 0", "--seeds is 0, and must be at least 1"),
        ("--short 8 --length 32", "--short is 8 and --length 32"),
        ("--worlds toy,nosuch", "'nosuch', which is no folder of toy/build.py"),
        ("--worlds toy,./toy", "need different names"),
    ],
)
def test_compare_refuses_before_anything_runs(words, says, tmp_path):
    with pytest.raises(SystemExit, match=says):
        compare.main(parse(compare.Args, [*words.split(), "--out_dir", str(tmp_path / "out")]))
    assert not list(tmp_path.rglob("log.jsonl"))


def test_what_switches_a_cause_off_is_the_only_difference():
    runs = findings.plan(compare.Args(), "toy")
    off = {
        "opd-as_one": ("opd", "ends", "as_one"), "offline_rl_distill-as_one": ("offline_rl_distill", "ends", "as_one"),
        "opd-short-as_one": ("opd-short", "ends", "as_one"), "curriculum-late": ("curriculum", "lengths", "32,96"),
        "curriculum-as_one": ("curriculum", "ends", "as_one"), "opd-same-end": ("opd-untied", "student", "same-end"),
        "opd-untied": ("opd", "student", "untied"), "opd-short": ("opd", "max_new_tokens", 8),
        "curriculum-no-gate": ("curriculum", "h_min", 0.0), "opd-sampled": ("opd", "estimator", "sampled"),
        "opd-sampled-as_one": ("opd-sampled", "ends", "as_one"),
        "grpo-after-opd": ("grpo-after-opd-short", "student", "opd"),
    }  # fmt: skip
    for name, (other, argument, value) in off.items():
        (script, arguments), (same_script, base) = runs[name], runs[other]
        base["eval_every"] = arguments["eval_every"]  # how often one looks changes nothing
        assert script == same_script and arguments == base | {argument: value} and base.get(argument) != value, name


def test_the_first_answer_is_read_from_the_responses(finished, tmp_path):
    shutil.copytree(finished / "seed-0", tmp_path / "run")
    said = ["=1\n####7####3", "####3\n####7", "no answer", "####7\n####3"]
    last = read_log(tmp_path / "run")[-1]["step"]
    write_jsonl(tmp_path / f"run/responses-{last}.jsonl", [{"response": text, "answer": "7"} for text in said])
    assert compare.read(str(tmp_path / "run"))[-1]["first_avg"] == 0.5


def test_the_variants_of_the_student_differ_from_it_in_nothing_but_the_ending(tmp_path):
    """untied: the same logits. same-end: those of the two endings exchanged."""
    findings.make_variants("toy", str(tmp_path))
    load = lambda path: transformers.AutoModelForCausalLM.from_pretrained(path)  # noqa: E731
    student, untied, same_end = load("toy/student"), load(tmp_path / "untied/model"), load(tmp_path / "same-end/model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "same-end/model")
    end_of_text, im_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    text = "<|im_start|>user\n3+8+5<|im_end|>\n<|im_start|>assistant\n=1+5=6\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logits, of_untied, of_same_end = (model(ids).logits for model in (student, untied, same_end))
    order = list(range(logits.shape[-1]))
    order[end_of_text], order[im_end] = im_end, end_of_text
    assert torch.equal(logits, of_untied) and torch.equal(logits[..., order], of_same_end)
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight
