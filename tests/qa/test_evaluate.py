"""evaluate.py and compare.py: the numbers of a run again, from outside, and what is drawn from them."""

import concurrent.futures
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from conftest import arguments_of, draw_curves, read_log, run, write_jsonl
from matplotlib.axes import Axes

import common
import compare
import evaluate
import opd
from plumbing.arguments import parse
from plumbing.data import Problem, load_problem_sets, load_problems
from plumbing.run import in_words, read_lines
from toy import findings


def evaluated(capsys, **arguments):
    """What evaluate.py prints, and the cells of its table."""
    run("evaluate", **arguments)
    printed = capsys.readouterr().out
    rows = printed.split("|---|\n")[1].splitlines()
    return printed, [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if row.startswith("|")]


def test_evaluate_gives_the_numbers_of_the_training_log_and_curves_show_them(world, tmp_path, monkeypatch, capsys):
    """Greedy, as otherwise the two draw different numbers; then --eval_k 8 stands for one sample, and says so."""
    more, file = dict(eval_temperature=0, eval_k=8, eval_max_new_tokens=6), tmp_path / "all.jsonl"
    drawn, plot = [], Axes.plot
    run("opd", **world | more, out_dir=tmp_path / "run")
    assert "  Avg@1 " in capsys.readouterr().out
    monkeypatch.setattr(Axes, "plot", lambda *a, label, **more: drawn.append(label) or plot(*a, label=label, **more))
    draw_curves(shutil.copytree(tmp_path / "run", tmp_path / "cost_$5_lr_$6"))  # which is no mathematics
    assert [*filter(None, drawn)] == "loss entropy eval_entropy response_len eval_len avg_at_k pass_at_k".split()
    more |= dict(model=tmp_path / "run/model", eval_data=world["eval_data"], eval_batch_size=2, out_file=file)
    printed, ((_, *cells),) = evaluated(capsys, **more)
    m = read_log(tmp_path / "run")[-1]
    accuracy = [f"{m[x]:.3f} ± {m[x + '_ci']:.3f}" for x in ("avg_at_k", "pass_at_k")]
    marks = [f"{m['eval_ended']:.1%}", f"{m['eval_len']:.1f}", f"{m['eval_marked']:.1%}", f"{m['eval_entropy']:.3f}"]
    assert cells == ["3", *accuracy, *marks] and "| Avg@1 | Pass@1 |" in printed
    ids = [[row["response_ids"] for row in read_lines(x)] for x in (file, tmp_path / "run/responses-3.jsonl")]
    assert ids[0] == ids[1] and len(ids[0]) == 3


def test_a_teachers_responses_are_data_as_they_stand_and_a_kill_costs_none(world, tmp_path, monkeypatch, capsys):
    """Prompts without answers get responses and no grades. What would be made otherwise does not go on in a file."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Say {i} words."} for i in range(5)])
    ask = dict(model=world["teacher"], eval_data=prompts, eval_k=2, eval_max_new_tokens=6, eval_batch_size=4)
    whole, killed = str(tmp_path / "whole.jsonl"), str(tmp_path / "killed.jsonl")
    table = evaluated(capsys, **ask, out_file=whole)[1]
    assert table[0][1:4] == ["5", "no answers", "no answers"]
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        parts = iter([common.respond] * 2)  # of two problems each, and then it is killed
        patch.setattr(evaluate, "respond", lambda *args, **more: next(parts)(*args, **more))
        run("evaluate", **ask, out_file=killed)
    assert len(read_lines(killed)) == 8
    assert evaluated(capsys, **ask, out_file=killed)[1] == table and read_lines(killed) == read_lines(whole)
    rows, problems = read_lines(whole), load_problems(whole, needs="response")[0]
    assert [p.response_ids for p in problems] == [row["response_ids"] for row in rows]
    assert [row["problem"] for row in rows] == sorted([*range(5)] * 2) and {row["correct"] for row in rows} == {None}
    for more, names in (({}, []), (dict(instruction="Now.", thinking=True), ["--instruction", "--thinking"])):
        quick = world | dict(data=whole, eval_data="none", steps=1, seed=3, max_new_tokens=2)  # which may differ
        run("sft_offpolicy", **quick | more, out_dir=tmp_path / f"run{len(names)}")
        assert re.findall(r"warning: the responses in .* were made with (\S+)", capsys.readouterr().out) == names
    for more in (dict(eval_temperature=0.5), dict(instruction="Now."), dict(eval_problems=3), dict(eval_k=1)):
        with pytest.raises(SystemExit, match="made otherwise: name another file"):
            run("evaluate", **ask | more, out_file=whole)
    with pytest.raises(SystemExit, match="must be a file in a folder that is there"):
        run("evaluate", **ask, out_file=tmp_path)


def test_levels_and_several_sets_stand_below_each_other(world, tmp_path, capsys, monkeypatch):
    """... with a model that says 1 and then 2 to every question, which is 1: the first #### counts."""
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "decode", lambda *_, **__: "#### 1\n#### 2")
    rows = [dict(question=f"{level}?", answer=1 + level % 2, level=level) for level in (10, 9, 2)]
    sets = [write_jsonl(tmp_path / f"{n}.jsonl", rows[:n]) for n in (3, 1)]
    table = evaluated(capsys, model=world["student"], eval_data=",".join(sets), eval_k=1, eval_max_new_tokens=2)[1]
    names, shares = [sets[0], "level 2", "level 9", "level 10", sets[1], "level 10"], [0.667, 1, 0, 1, 1, 1]
    assert [(row[0], float(row[2][:5]), row[6]) for row in table] == [(*x, "100.0%") for x in zip(names, shares)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": i} for i in range(10)])
    assert [p.answer for p in load_problem_sets(path, 4)[path]] == ["0", "2", "5", "7"], "evenly spread"


def test_metrics_worked_out_by_hand_and_their_means_over_sets(monkeypatch):
    """Two problems, four samples: 1 of 4 and 4 of 4 right. Avg@2 = .625; Pass@2 = (1 − C(3,2)/C(4,2) + 1)/2 = .75. Of
    several sets each counts alike, and half-widths add up as those of independent numbers do."""
    right = [(0, 1), (0, 0), (0, 0), (0, 0), (1, 1), (1, 1), (1, 1), (1, 1)]
    of_four = lambda i: dict(length=10 + i % 4, ended=i % 4 > 0, marked=i % 4 > 2, nats=5.0 + i % 4)
    m = common.summarize([dict(problem=p, correct=c, **of_four(i)) for i, (p, c) in enumerate(right)], k=2)
    assert (m["avg_at_k"], m["pass_at_k"], m["eval_len"], m["problems"]) == (0.625, 0.75, 11.5, 2)
    assert (m["eval_ended"], m["eval_entropy"], m["eval_marked"]) == (0.75, 6.5 / 11.5, 0.25), "per token, not response"
    assert m["avg_at_k_ci"] == pytest.approx(1.96 * (0.75 / 2**0.5) / 2**0.5)
    line, warning = in_words(m | dict(eval_len=32768.0, eval_entropy=11.9), 16).split("\n")
    assert len(f"step 10000  {line}") <= 100 and "only 25% of the responses mark an answer" in warning
    assert "\n" not in in_words(m | {"eval_marked": 0.5}, 16)
    names, sets = ("avg_at_k", "avg_at_k_ci", "problems"), {"a": (0.2, 0.18, 30), "b": (0.6, 0.04, 1319)}
    monkeypatch.setattr(common, "respond", lambda model, problems, *_, **__: [{"name": problems[0].question}])
    monkeypatch.setattr(common, "summarize", lambda records, k: dict(zip(names, sets[records[0]["name"]])))
    m, said = common.evaluate(None, {name: [Problem(name)] for name in sets}, None, opd.Args())
    assert m["avg_at_k"] == pytest.approx(0.4) and (m["problems"], m["avg_at_k/b"]) == (1349, 0.6)
    assert m["avg_at_k_ci"] == pytest.approx((0.18**2 + 0.04**2) ** 0.5 / 2) and [r["set"] for r in said] == [*sets]


def test_findings_are_differences_with_t_intervals_that_leave_out_zero(tmp_path, monkeypatch):
    assert [compare.t_quantile(n) for n in (1, 9, 120)] == pytest.approx([12.706, 2.262, 1.980], rel=2e-3)
    seeds = lambda *values: [[{"flops": 0.0, "avg_at_k": 0.2}, {"flops": 4.0, "avg_at_k": x}] for x in values]
    worlds = {"one": dict(a=seeds(0.2, 0.25, 0.3), b=seeds(0.5, 0.5, 0.5)), "two": dict(a=seeds(0.6), b=seeds(0.5))}
    numbers = [(+1, lambda v: v("a") - v("b")), (-1, lambda v: v("a") - v("b")), (-1, lambda v: v("a") - 0.3)]
    numbers += [(+1, lambda v: v("b", "avg_at_k", [2.0] * 3) - 0.2)]  # after half of the FLOPs
    monkeypatch.setattr(findings, "claims", lambda args: [("axis", "a claim", *number) for number in numbers])
    said = compare.write_findings(worlds, compare.Args(out_dir=str(tmp_path)))
    found = re.findall(r"\| ([-+.\d]+ ± \S+) \| ([-+.\d]+) \| (.*) \|", said)
    assert found[:2] == [("-0.250 ± 0.124", "+0.100", f"{word} in 1 of 2") for word in ("the opposite", "found")]
    assert found[2:] == [("-0.050 ± 0.124", "+0.300", "not found"), ("+0.150 ± 0.000", "+0.150", "found")]


def test_compare_runs_what_is_missing_and_only_that(world, tmp_path, monkeypatch, capsys):
    """The whole of it in miniature, in this process: runs, tables and figures; the second time nothing runs."""
    real, small = findings.plan, world | dict(steps=1, batch_size=2, lengths="6", eval_every=0)
    student = lambda its, runs: its["student"] if its["student"] in runs else small["student"]
    shrink = lambda s, its, runs: (s, its | arguments_of(s, small, student=student(its, runs)))
    plan = lambda *args: {name: shrink(*run, real(*args)) for name, run in real(*args).items()}
    done = lambda result: [future := concurrent.futures.Future(), future.set_result(result)][0]
    pool = SimpleNamespace(submit=lambda function, *args: done(function(*args)), shutdown=lambda **_: None)
    monkeypatch.setattr(findings, "plan", plan)
    monkeypatch.setattr(compare.concurrent.futures, "ProcessPoolExecutor", lambda *args, **options: pool)
    words = f"--out_dir={tmp_path} --worlds=toy --seeds=1 --steps=4 --rl_steps=1 --short=2 --length=9".split()
    main = lambda *more: compare.main(parse(compare.Args, [*words, *more])) or parse(compare.Args, words)
    args = main()
    assert {f"{name}.png" for name in findings.figures(args)} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "findings.md").read_text(encoding="utf-8").count("| one seed |") == len(findings.claims(args))
    assert list(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["toy"]) == list(real(args, "toy"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*")}
    compare.run_all(args, "toy", 1)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*")} and len(before) > 60
    a, b = dirs = [str(tmp_path / f"toy/{name}-seed-0") for name in ("opd", "dagger_onpolicy")]
    main("--dirs", *dirs)
    file, unlike = Path(b, "args.json"), "not evaluated alike: they differ in --eval_k\n"
    assert unlike not in capsys.readouterr().out and (tmp_path / "together.png").exists()
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"eval_k": 4}), encoding="utf-8")
    main("--dirs", *dirs)
    assert unlike in (said := capsys.readouterr().out) and f" | {read_log(a)[-1]['eval_entropy']:.3f} | " in said
    refused = {"--worlds=toy,no": "'no', which is no folder", "--worlds=toy,./toy": "different names"}
    for more, says in (refused | {"--seeds=0": "--seeds is 0, and must be at least 1"}).items():
        with pytest.raises(SystemExit, match=says):
            main(more)
