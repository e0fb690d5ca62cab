"""bench/bench.py: that it runs, that what it times is opd.py's step, and that TRL's loss is ours where TRL is there."""

import importlib.util
import json
import sys

import pytest
import torch
import transformers
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import bench


def test_our_side_prints_a_table_and_writes_its_measurements(capsys, tmp_path):
    out = tmp_path / "measured.jsonl"
    bench.main(bench.Args(preset="toy", contestants="ours", repeats=1, steps=1, out=str(out)))
    printed = capsys.readouterr().out
    assert "**toy**: 128x2 <- 256x4, V = 256, batch 16, prompt 32, completion 64, fp32" in printed
    head, rule, row = (line for line in printed.splitlines() if line.startswith("|"))
    assert row.startswith("| ours | 0.") and head.count("|") == rule.count("|") == row.count("|")
    (record,) = map(json.loads, out.read_text().splitlines())
    assert {"machine", "date", "torch", "transformers", "student", "seed", "loss"} <= record.keys()
    assert set(record["cpu"]) == set(bench.PHASES) and all(seconds > 0 for seconds in record["cpu"].values())
    assert record["peak"] > 0


@pytest.mark.parametrize("contestant", ["ours", "plain"])
def test_the_gpu_presets_path_in_small(contestant):
    args = bench.Args(preset="h200", shrink=True, precision="bf16", device="cpu")
    assert bench.measure(contestant, bench.make_case(args))["loss"] > 0


@pytest.mark.parametrize("contestant", ["ours", "plain"])
def test_head_and_kl_alone_in_small(contestant):
    record = bench.measure(contestant, bench.make_case(bench.Args(preset="real", shrink=True, device="cpu"), tokens=40))
    assert record["loss"] > 0 and record["gradient"] > 0


def test_what_is_timed_are_the_lines_of_opd_py():
    scripts = [(ROOT / path).read_text().split("\n") for path in ("opd.py", "bench/bench.py")]
    opd, ours = ({line.split("  # ")[0].strip() for line in lines} for lines in scripts)
    for beginning in (
        "optimizer = ", "rollouts = ", "n_rollouts, ", "for micro ", "weights = ", "micro_loss, ", "(micro_loss", "loss, ",
        "grad_norm = ", "optimizer.step", "optimizer.zero",
    ):  # fmt: skip
        assert [line for line in opd & ours if line.startswith(beginning)], f"no line {beginning!r} in both"


def test_limits_of_the_gpu_preset():
    published = {"0.6B": 596_049_920, "1.7B": 1_720_574_976, "4B": 4_022_468_096, "8B": 8_190_735_360}
    case = bench.make_case(bench.Args(preset="h200", device="cpu"))
    for name, parameters in published.items():
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(bench.model_config(name, case))
        assert model.num_parameters() == parameters
    want = dict(rollout=(1.22e12 + 2.40e12) / 4.3e12, teacher=306 / 790, student=143 / 790)
    assert {k: v for k, v in bench.limits(case).items() if k in want} == pytest.approx(want, rel=0.01)


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match="--preset is 'big'"):
        bench.main(bench.Args(preset="big"))
    with pytest.raises(SystemExit, match="--contestants has verl"):
        bench.main(bench.Args(contestants="ours,verl"))


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is optional: bench/requirements.txt")
def test_trl_has_the_same_loss(capsys):
    """Every measurement of a TRL side compares loss and gradient with ours, and fails where they differ."""
    bench.main(bench.Args(preset="toy", shrink=True, contestants="ours,trl_distillation,trl_gkd", repeats=1, steps=1))
    printed = capsys.readouterr().out
    assert "trl_distillation: loss" in printed and "trl_gkd: loss" in printed
