"""evaluate.py and compare.py: the numbers of a run again, from outside, and what is drawn from them."""

import csv
import json
from pathlib import Path

import pytest
import transformers
from conftest import read_log, run, write_jsonl

import compare
import evaluate
from common import summarize
from plumbing.runs import parse, pool
from plumbing.tasks import load_evals


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """Two finished runs of different seeds."""
    root = tmp_path_factory.mktemp("finished")
    for seed in (0, 1):
        run("opd", **world, seed=seed, eval_every=1, out_dir=root / f"seed-{seed}")
    return root


def test_evaluate_gives_the_numbers_of_the_training_log(world, finished, tmp_path, capsys):
    argv = f"--model {finished}/seed-0/model --eval_data {world['eval_data']} --eval_k 2 --eval_max_new_tokens 6"
    argv += f" --eval_batch_size 2 --out_file {tmp_path}/all.jsonl"
    evaluate.main(parse(evaluate.Args, argv.split()))
    expected = read_log(finished / "seed-0")[-1]
    cells = capsys.readouterr().out.splitlines()[2].split("|")[2:-1]
    problems, avg, passed, length, cut, marked, entropy = (float(cell.split("±")[0].strip(" %")) for cell in cells)
    assert (problems, avg, passed) == (3, round(expected["avg_at_k"], 3), round(expected["pass_at_k"], 3))
    assert (length, entropy) == (round(expected["eval_len"], 1), round(expected["eval_entropy"], 3))
    rows = [json.loads(line) for line in Path(tmp_path, "all.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and {"prompt", "response", "answer", "correct", "length", "ended"} <= set(rows[0])


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
    """Sets of 30, 40, 500 and 1,319 problems: half-widths .18, .15, .04 and .03 give .06, and not their mean, .10."""
    widths, sizes = (0.18, 0.15, 0.04, 0.03), (30, 40, 500, 1319)
    sets = [dict(avg_at_k=a, avg_at_k_ci=w, pass_at_k_ci=w, problems=n) for a, w, n in zip((0, 0.2, 0.4, 0.6), widths, sizes)]
    m = pool(sets)
    assert m["avg_at_k"] == pytest.approx(0.3) and m["problems"] == 1889
    assert m["avg_at_k_ci"] == pytest.approx((0.18**2 + 0.15**2 + 0.04**2 + 0.03**2) ** 0.5 / 4)


def test_a_subset_is_spread_over_the_set(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": i} for i in range(10)])
    taken = lambda n: [p.answer for p in load_evals(path, n)[path]]  # noqa: E731
    assert taken(4) == ["0", "2", "5", "7"] and len(taken(0)) == len(taken(99)) == 10


def test_answers_without_a_mark_are_wrong_said_so_and_can_be_read_all_the_same(world, tmp_path, monkeypatch, capsys):
    """A model that says 1 to every question; 1 is right for one of three."""
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "decode", lambda self, ids, **_: "so it is 1 apple")
    rows = {}
    for grading in ("marked", "last_number"):
        argv = f"--model {world['student']} --eval_data {world['eval_data']} --eval_k 2 --eval_max_new_tokens 4"
        evaluate.main(parse(evaluate.Args, [*argv.split(), "--grade", grading]))
        out = capsys.readouterr().out
        rows[grading] = [cell.split("±")[0].strip() for cell in out.splitlines()[2].split("|")[2:-1]]
        assert "only 0% of the responses mark an answer" in out and "--instruction" in out
        assert ("by their last number" in out) == (grading == "last_number")
    assert rows["marked"][1] == "0.000" and rows["last_number"][1] == "0.333"
    assert rows["marked"][5] == rows["last_number"][5] == "0.0%"


def test_compare_draws_any_runs_together(finished, tmp_path, capsys):
    argv = ["--dirs", str(finished / "seed-0"), str(finished / "seed-1"), "--out_dir", str(tmp_path)]
    compare.main(parse(compare.Args, argv))
    assert (tmp_path / "together.png").stat().st_size > 5000
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    for seed, row in enumerate(rows):
        assert float(row["eval_entropy"]) == pytest.approx(
            read_log(finished / f"seed-{seed}")[-1]["eval_entropy"], rel=1e-5
        )


def test_intervals_over_seeds_are_t_intervals():
    mean, ci = compare.mean_ci([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0 and ci == pytest.approx(2.776 * 2.5**0.5 / 5**0.5, rel=2e-3)
    tables = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 10: 2.228, 11: 2.201, 15: 2.131, 30: 2.042, 120: 1.980}
    assert {n: compare.t_quantile(n) for n in tables} == pytest.approx(tables, rel=2e-3)


def test_compare_runs_what_is_missing_and_only_that(world, finished, tmp_path, monkeypatch):
    """The whole of it in miniature: plan, runs, tables and figures; the second time nothing runs."""
    real = compare.plan
    small = {k: world[k] for k in ("teacher", "data", "eval_data", "eval_max_new_tokens", "eval_k")}

    def plan(args):
        runs = real(args)
        for name, (script, arguments) in runs.items():
            arguments = {"student": world["student"], "batch_size": 2, **small, **arguments, "eval_every": 0}
            if script == "grpo":
                del arguments["teacher"]
            if script == "curriculum":
                arguments |= dict(held_out=2)
            runs[name] = (script, arguments)
        return runs

    monkeypatch.setattr(compare, "plan", plan)
    monkeypatch.setattr(compare.concurrent.futures, "ProcessPoolExecutor", InProcess)
    args = parse(compare.Args, f"--out_dir {tmp_path} --seeds 1 --steps 4 --rl_steps 1 --length 8".split())
    compare.main(args)
    figures = {f"{name}.png" for name in "direction prefixes length mixing ending curriculum rl".split()}
    assert figures <= {p.name for p in tmp_path.iterdir()}
    assert len((tmp_path / "findings.md").read_text().splitlines()) == 2 + len(compare.claims(args))
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + len(real(args))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/log.jsonl")}
    compare.run_all(args)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/log.jsonl")}
    assert len(before) == len(real(args))
    table = compare.write_tables({"opd": [str(finished / "seed-0"), str(finished / "seed-1")]}, str(tmp_path))
    assert "| opd | 2 |" in table and table.count(" ± ") == len(compare.METRICS)


def test_a_claim_is_found_or_not_by_its_interval(tmp_path):
    """Three seeds of two made-up runs: b costs twice as much as a for each step."""

    def made_up(name, values, cost):
        paths = []
        for seed, value in enumerate(values):
            (tmp_path / f"{name}-{seed}").mkdir()
            rows = [{"step": 0, "avg_at_k": 0.2, "pass_at_k": 0.4}]
            rows += [
                {"step": s, "loss": 1.0, "flops": cost * s, "clip_ratio": 0.9 if s < 3 else 0.1} for s in (1, 2, 3)
            ]
            rows += [
                {"step": 4, "loss": 1.0, "flops": cost * 4, "clip_ratio": 0.1, "avg_at_k": value, "pass_at_k": 0.8}
            ]
            write_jsonl(tmp_path / f"{name}-{seed}/log.jsonl", rows)
            paths.append(str(tmp_path / f"{name}-{seed}"))
        return paths

    groups = {"a": made_up("a", [0.5, 0.6, 0.7], 1.0), "b": made_up("b", [0.6, 0.72, 0.78], 2.0)}
    claim = lambda sign, **more: compare.Claim("axis", "says", sign, **more)  # noqa: E731
    assert compare.differences(claim(1, a="b", b="a"), groups) == pytest.approx([0.1, 0.12, 0.08])
    # at a's last FLOPs, 4, b is half way from its 0.2 to its last value
    assert compare.differences(claim(1, a="b", b="a", equal_flops=True), groups) == pytest.approx([-0.1, -0.14, -0.21])
    assert compare.differences(claim(1, a="a", value="gain"), groups) == pytest.approx([0.3, 0.4, 0.5])
    assert compare.differences(claim(1, a="a", value="inflated"), groups) == pytest.approx([0.5] * 3)
    assert compare.differences(claim(1, a="a", value="pass_over_avg"), groups) == pytest.approx([1.6, 4 / 3, 8 / 7])
    cases = [claim(1, a="b", b="a"), claim(-1, a="b", b="a"), claim(1, a="a", b="b", value="pass_at_k")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "claims", lambda args: cases)
        lines = compare.write_findings(groups, compare.Args(out_dir=str(tmp_path))).splitlines()[2:]
    assert [line.split(" | ")[-1].rstrip(" |") for line in lines] == ["found", "the opposite", "undecided"]
    assert "+0.100 ± 0.050" in lines[0]


class InProcess:
    """A pool that runs jobs where it stands: a spawned worker would import torch anew for seconds."""

    def __init__(self, *args, **kwargs):
        pass

    def submit(self, function, *args):
        future = compare.concurrent.futures.Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, **kwargs):
        pass
