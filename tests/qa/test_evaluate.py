"""evaluate.py and compare.py: the numbers of a run again, from outside, and what is drawn from them."""

import contextlib
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from conftest import arguments_of, argv, draw_curves, read_log, run, write_jsonl

import common
import compare
import opd
import plumbing.run
import toy.build
from plumbing.arguments import parse
from plumbing.data import Problem, load_problem_sets, load_problems
from plumbing.run import in_words, read_lines


def evaluated(capsys, **arguments):
    """What evaluate.py prints, and the cells of its table."""
    run("evaluate", **arguments)
    printed = capsys.readouterr().out
    rows = printed.split("|---|\n")[1].splitlines()
    return printed, [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows if row.startswith("|")]


def test_evaluate_gives_the_numbers_of_the_training_log_and_curves_show_them(world, tmp_path, monkeypatch, capsys):
    """Greedy, as otherwise the two draw different numbers; then --eval_k 8 stands for one sample, and says so."""
    more, file = dict(eval_temperature=0, eval_k=8, eval_max_new_tokens=6), tmp_path / "all.jsonl"
    drawn, draw = {}, plumbing.run.draw
    run("opd", **world | more, out_dir=tmp_path / "run")
    assert "  solved (Avg@1) " in capsys.readouterr().out
    monkeypatch.setattr(plumbing.run, "draw", lambda *args: drawn.update(args[2]) or draw(*args))
    draw_curves(shutil.copytree(tmp_path / "run", tmp_path / "cost_$5_lr_$6"))  # which is no mathematics
    lines = [list(lines) for lines in drawn.values()]
    assert lines == [["training"]] * 2 + [["training", "evaluation"]] * 3 + [["evaluation", "useful", "Pass@k"]]
    solved = [(row["step"], row["avg_at_k"], 0) for row in read_log(tmp_path / "run") if "avg_at_k" in row]
    assert drawn["solved"]["evaluation"] == tuple(zip(*solved))
    more |= dict(model=tmp_path / "run/model", eval_data=world["eval_data"], eval_batch_size=2, out_file=file)
    printed, ((_, *cells),) = evaluated(capsys, **more)
    m = read_log(tmp_path / "run")[-1]
    accuracy = [f"{m[x]:.3f} ± {m[x + '_ci']:.3f}" for x in ("avg_at_k", "pass_at_k")]
    shares = [f"{m[f'eval_{x}']:.3f}" for x in ("ended", "useful", "marked", "entropy")]
    shares.insert(2, f"{m['eval_len']:.1f}")
    assert cells == ["3", *accuracy, *shares] and "| solved (Avg@1) | Pass@1 |" in printed
    ids = [[row["response_ids"] for row in read_lines(x)] for x in (file, tmp_path / "run/responses-3.jsonl")]
    assert ids[0] == ids[1] and len(ids[0]) == 3


def test_prompts_without_answers_get_responses_and_no_grades_and_no_file_is_overwritten(world, tmp_path, capsys):
    """A prompt's draws do not depend on the file's name. (That a kill costs nothing: tests/test_scripts.py.)"""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Say {i} words."} for i in range(5)])
    ask = dict(model=world["teacher"], eval_data=prompts, eval_k=2, eval_max_new_tokens=6, eval_batch_size=4)
    whole, other = str(tmp_path / "whole.jsonl"), str(tmp_path / "new/other.jsonl")
    table = evaluated(capsys, **ask, out_file=whole)[1]
    assert [table[0][i] for i in (1, 2, 3, 5)] == ["5", "no answers", "no answers", "no answers"]
    rows, problems = read_lines(whole), load_problems(whole, needs="response")[0]
    begun = tmp_path / "begun.jsonl"
    begun.write_bytes(Path(whole).read_bytes()[:30])  # a kill in the middle of the first row
    assert evaluated(capsys, **ask, out_file=begun)[1] == table and read_lines(begun) == rows
    run("evaluate", **ask | dict(eval_data=shutil.copy(prompts, tmp_path / "renamed.jsonl")), out_file=other)
    assert [row["response_ids"] for row in read_lines(other)] == [row["response_ids"] for row in rows]
    assert [p.response_ids for p in problems] == [row["response_ids"] for row in rows]
    assert [row["problem"] for row in rows] == sorted([*range(5)] * 2) and {row["correct"] for row in rows} == {None}
    for place, says in (
        (prompts, "holds something else than responses: name another"),
        (write_jsonl(tmp_path / "list.json", [[1, 2]]), "holds something else"),
        (tmp_path, "name another file"),
        (tmp_path / "prompts.jsonl/a", "name another file"),
    ):
        with pytest.raises(SystemExit, match=says):
            run("evaluate", **ask, out_file=place)


def test_a_conversation_and_its_response_become_the_same_prompt_again(world, tmp_path, capsys):
    """... with its system turn and what was said before. Answers that are sentences are counted, and not graded."""
    said = [dict(role="system", content="Add."), dict(role="user", content="1+1?"), dict(role="assistant", content="2")]
    ask = lambda i: [*said, dict(role="user", content=f"And {i}+1?")]
    rows = [dict(messages=ask(i), answer="It is three, as one and two are three.") for i in (2, 3)]
    ask = dict(eval_data=write_jsonl(tmp_path / "a.jsonl", rows), eval_k=1, eval_max_new_tokens=6)
    file = str(tmp_path / "b.jsonl")
    printed, table = evaluated(capsys, model=world["teacher"], **ask, out_file=file)
    assert "2 answers are sentences, which no other wording equals" in printed and float(table[0][2][:5]) == 0
    before, after = (load_problems(path)[0] for path in (ask["eval_data"], file))
    assert [(p.question, [*p.before]) for p in before] == [(p.question, [*p.before]) for p in after]
    same = [
        dict(row, messages=[*row["messages"][:i], row["messages"][3]], response="#### 1")
        for i in (0, 3)
        for row in rows[:1]
    ]
    assert evaluated(capsys, model="none", eval_data=write_jsonl(tmp_path / "c.jsonl", same))[1][0][1] == "2"


def test_responses_that_stand_in_the_file_are_graded_without_a_model(tmp_path, capsys):
    """As vLLM may have made them: rows with one question are samples of one problem."""
    rows = [dict(question="1+1?", answer=2, response=text) for text in ("\\boxed{2}", "\\boxed{3}", "#### 2", "")]
    rows += [dict(question="2+2?", answer=4, response="\\boxed{4}", ended=i > 0, level=1) for i in range(4)]
    rows += [dict(question="Why?", response="#### 7")] * 4  # no answer: not one that is never solved
    path, again = (write_jsonl(tmp_path / name, rows) for name in ("made.jsonl", "again.jsonl"))
    printed, table = evaluated(capsys, model="none", eval_data=f"{path} , {again}", eval_k=2)
    assert [row[0] for row in table] == [path, "level 1", again, "level 1"] and "solved (Avg@2) | Pass@2" in printed
    assert f"{path}: 4 rows have no answer, and are not graded" in printed
    assert table[0][1:] == ["3", "0.750 ± 0.490", "0.917 ± 0.163", "0.917", "0.625", "nan", "0.917", "nan"]
    assert "Pass@4" in evaluated(capsys, model="none", eval_data=path)[0], "no k beyond what is there"
    ids = write_jsonl(tmp_path / "ids.jsonl", [dict(question="a", answer=1, response_ids=[1])])
    with pytest.raises(SystemExit, match="1 rows without a response as text.: name it by --columns response=NAME"):
        run("evaluate", model="none", eval_data=ids)
    with pytest.raises(SystemExit, match="leave out --out_file"):
        run("evaluate", model="none", eval_data=path, out_file=tmp_path / "graded.jsonl")


def test_levels_and_several_sets_stand_below_each_other(world, tmp_path, capsys, monkeypatch):
    """... with a model that says 1 and then 2 to every question, which is 1: the first #### counts."""
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "decode", lambda *_, **__: "#### 1\n#### 2")
    rows = [dict(question=f"{level}?", answer=1 + level % 2, level=level) for level in (10, 9, 2)]
    sets = [write_jsonl(tmp_path / f"{n}.jsonl", rows[:n]) for n in (3, 1)]
    table = evaluated(capsys, model=world["student"], eval_data=",".join(sets), eval_k=1, eval_max_new_tokens=2)[1]
    names, shares = [sets[0], "level 2", "level 9", "level 10", sets[1], "level 10"], [0.667, 1, 0, 1, 1, 1]
    assert [(row[0], float(row[2][:5]), row[7]) for row in table] == [(*x, "1.000") for x in zip(names, shares)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": i} for i in range(10)])
    assert [p.answer for p in load_problem_sets(path, 4)[path]] == ["0", "2", "5", "7"], "evenly spread"


def test_metrics_worked_out_by_hand_and_their_means_over_sets(monkeypatch):
    """Two problems, four samples: 1 of 4 and 4 of 4 right. Avg@2 = .625; Pass@2 = (1 − C(3,2)/C(4,2) + 1)/2 = .75. Of
    several sets each counts alike, and half-widths add up as those of independent numbers do."""
    right = [(0, 1), (0, 0), (0, 0), (0, 0), (1, 1), (1, 1), (1, 1), (1, 1)]
    of_four = lambda i: dict(length=10 + i % 4, ended=i % 4 > 0, marked=i % 4 > 2, nats=5.0 + i % 4)
    records = [dict(problem=p, correct=c, **of_four(i)) for i, (p, c) in enumerate(right)]
    m = common.summarize(records, k=2)
    assert (m["avg_at_k"], m["pass_at_k"], m["eval_len"], m["problems"]) == (0.625, 0.75, 11.5, 2)
    assert (m["eval_ended"], m["eval_entropy"], m["eval_marked"]) == (0.75, 6.5 / 11.5, 0.25), "per token, not response"
    assert m["eval_useful"] == 0.375, "the first of each four was cut"
    assert m["avg_at_k_ci"] == pytest.approx(1.96 * (0.75 / 2**0.5) / 2**0.5)
    more = common.summarize([*records, *(dict(problem=2, correct=None, **of_four(i)) for i in range(4))], k=2)
    assert more == m | dict(problems=3, eval_len_ci=0, eval_ended_ci=0, eval_marked_ci=0), "one without an answer"
    line, *warning = in_words(m | dict(eval_len=32768.0, eval_entropy=11.9), 16).split("\n")
    assert max(map(len, [f"step 10000  {line}", *warning])) <= 100
    assert warning[0].startswith("warning: only 25% of the responses mark an answer")
    assert "\n" not in in_words(m | {"eval_marked": 0.5}, 16)
    names, sets = ("avg_at_k", "avg_at_k_ci", "problems"), {"a": (0.2, 0.18, 30), "b": (0.6, 0.04, 1319)}
    monkeypatch.setattr(common, "respond", lambda model, problems, *_, **__: [{"name": problems[0].question}])
    monkeypatch.setattr(common, "summarize", lambda records, k: dict(zip(names, sets[records[0]["name"]])))
    m, said = common.evaluate(None, {name: [Problem(name)] for name in sets}, None, opd.Args())
    assert m["avg_at_k"] == pytest.approx(0.4) and (m["problems"], m["avg_at_k/b"]) == (1349, 0.6)
    assert m["avg_at_k_ci"] == pytest.approx((0.18**2 + 0.04**2) ** 0.5 / 2) and [r["set"] for r in said] == [*sets]


def test_a_finding_needs_an_interval_without_zero_and_the_sign_in_every_world(monkeypatch):
    assert [compare.mean_ci([0.0] * n + [1.0])[1] for n in (1, 2)] == pytest.approx([12.706 / 2, 4.303 / 3], rel=1e-3)
    seeds = lambda *values: [{"FLOPs": [0.0, 4.0], "solved": [0.2, x]} for x in values]
    worlds = {"one": dict(a=seeds(0.2, 0.25, 0.3), b=seeds(0.5, 0.5, 0.5)), "two": dict(a=seeds(0.6), b=seeds(0.5))}
    worlds["one"]["half"] = [run | {"FLOPs": [0.0, 2.0]} for run in seeds(0.4, 0.4, 0.4)]
    worlds["two"] |= dict(half=seeds(0.9), c=seeds(0.65))
    worlds["one"]["c"] = seeds(0.3, 0.3, 0.3)
    expected = [
        (("a differs by world", -1, "solved", "a", "b"), "-0.250 | -0.374 to -0.126 | +0.100 | open"),
        (("gain", +1, "solved", "a", "c"), "-0.050 | -0.174 to +0.074 | -0.050 | open"),
        (("sure", +1, "solved", "b", "c"), "+0.200 | +0.200 to +0.200 | -0.150 | open"),
        (("after half of the FLOPs", +1, "solved at equal FLOPs", "half", "b"), "+0.050 | +0.050 to +0.050 | "),
        (("two minus two", -1, "solved", "half + b", "c + c"), "+0.300 | +0.300 to +0.300 | +0.100 | **opposite**"),
        (("the same", +1, "solved", "half + b", "c + c"), "+0.300 | +0.300 to +0.300 | +0.100 | reproduced"),
    ]
    monkeypatch.setattr(compare, "CLAIMS", [claim for claim, _ in expected])
    for row, (claim, says) in zip(compare.findings(worlds).splitlines()[2:], expected):
        assert row.startswith(f"| {claim[0]} | {claim[2]}: {claim[3]} − {claim[4].replace('+', '−')} | {says}"), row


def test_compare_runs_what_is_missing_and_only_that(world, tmp_path, monkeypatch, capsys):
    """The whole of it in miniature, in this process: runs, tables and figures; the second time nothing runs."""
    real, small = compare.plan, world | dict(steps=1, batch_size=2, lengths="6", eval_every=0, max_new_tokens=6)

    def plan(place, out, seed):
        """As it is, but for models, data and lengths; what starts from another run starts from that."""
        for kind, command in real(place, out, seed).items():
            script = command.split(".py")[0]
            less = {name: x for name, x in arguments_of(script, small).items() if script != "grpo" or name != "student"}
            yield kind, f"{command} {shlex.join(argv(less))}"

    built = lambda args: [Path(args.out).mkdir(), Path(args.out, f"seed-{args.seed}").touch(), None][-1]
    pool = contextlib.nullcontext(SimpleNamespace(map=map))
    monkeypatch.setattr(compare, "plan", lambda *args: dict(plan(*args)))
    monkeypatch.setattr(toy.build, "main", built)
    monkeypatch.setattr(compare, "ProcessPoolExecutor", lambda *args: pool)
    main = lambda *words: compare.main(parse(compare.Args, [f"--out_dir={tmp_path}/out", *words]))
    main("--worlds", f"toy,{tmp_path}/other-7", "--seeds=1")
    out = tmp_path / "out"
    assert (tmp_path / "other-7/seed-7").exists(), "a world that is missing is built"
    assert {f"{name}.png" for name in compare.FIGURES} <= {path.name for path in out.iterdir()}
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(results) == ["toy", "other-7"] and len(results["toy"]) == len(real("toy", "", 0)) <= 20
    assert results["toy"]["base-curriculum"][0]["gates"][0][0] == 6 and len(compare.CLAIMS) <= 10
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*")}
    compare.run_all(compare.Args(out_dir=str(out), worlds="toy", seeds=1))
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/*/*")} and len(before) > 100
    capsys.readouterr()
    main("--dirs", a := str(out / "toy/opd-seed-0"), str(out / "toy/grpo-opd-seed-0"))
    assert (out / "overlay.png").exists() and f" | {read_log(a)[-1]['eval_entropy']:.3f} | " in capsys.readouterr().out
    for words, says in (
        {
            "--seeds=11": "--seeds: invalid choice: '11'",
            "--workers=0": "--workers is 0, and must be at least 1",
            "--dirs=no": "'no' has no log",
        }
    ).items():
        with pytest.raises(SystemExit, match=says):
            main(words)


def test_compare_runs_several_at_once_and_stops_at_the_first_that_fails(world, tmp_path, monkeypatch):
    """In processes of their own. One that has run a script ends when it is told to, and a refusal is a line."""
    command = lambda steps: f"opd.py {shlex.join(argv(world | dict(eval_data='none', steps=steps)))}"
    plans = [{"a": command(1), "b": command(1)}, {"c": command(1), "d": command(0), "e": command(1)}]
    monkeypatch.setattr(compare, "plan", lambda *args: plans[0])
    args = compare.Args(out_dir=str(tmp_path), worlds=str(Path(world["data"]).parent), seeds=1)
    ((dirs,),) = [found.values() for found in [compare.run_all(args)]]
    assert all((Path(directory) / "model").exists() for (directory,) in dirs.values())
    monkeypatch.setattr(compare, "plan", lambda *args: plans[1])
    with pytest.raises(SystemExit, match="--steps is 0"):
        compare.run_all(args)
    with pytest.raises(SystemExit, match="--worlds: no 'nowhere', and no seed to build it by"):
        compare.run_all(compare.Args(worlds="nowhere"))
