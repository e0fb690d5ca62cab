"""docs/real_pair.py in small: the toy's models in place of the real ones."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from transformers import AutoConfig

import evaluate
from common import forward_kl, reverse_kl, sample, weighted_kl
from docs import real_pair
from plumbing.models import Vocab
from plumbing.runs import parse


def test_kls_by_token_are_those_of_the_loss():
    names = [str(ROOT / "toy" / name) for name in ("student", "teacher")]
    student, teacher = (transformers.AutoModelForCausalLM.from_pretrained(name).eval() for name in names)
    vocab = Vocab(student.config.vocab_size, (0, 2), 0)
    prompts, keys = [tuple(range(3, 7 + i % 3)) for i in range(10)], [(0, i) for i in range(10)]
    rollouts = sample(student, prompts, keys, vocab, 60)
    rows = real_pair.token_kls(student, teacher, rollouts, vocab)
    assert len({row["tokens"] for row in rows}) > 2
    for i, row in enumerate(rows):
        (alone,) = real_pair.token_kls(student, teacher, rollouts.take(torch.tensor([i])), vocab)
        assert row == pytest.approx(alone, rel=1e-3)
    weights = rollouts.mask.float()
    for key, divergence in (("forward", forward_kl), ("reverse", reverse_kl)):
        loss, entropy = weighted_kl(divergence, student, teacher, rollouts, weights, vocab)
        assert sum(row[key] for row in rows) == pytest.approx(loss.item(), rel=1e-5)
    assert sum(row["entropy"] for row in rows) == pytest.approx(entropy.item(), rel=1e-5)
    assert [row["tokens"] for row in rows] == rollouts.mask.sum(1).tolist()


def test_the_whole_command_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    args = real_pair.Args("toy/student", "toy/teacher", data="toy/train.jsonl", eval_data="toy/eval.jsonl")
    recipe = tmp_path / "recipe.txt"
    words = "--steps 2 --batch_size 2 --max_new_tokens 4 --eval_problems 2 --eval_k 1 --eval_max_new_tokens 6"
    recipe.write_text(words)
    runs = {"opd-seed-0": ("opd", 0, {}), "mix-seed-1": ("kl_mix", 1, {"eval_problems": 1, "lam": 0.2})}
    small = dict(EVAL_PROMPTS=6, ACCURACY_PROBLEMS=8, ACCURACY_TOKENS=24)
    for name, value in (small | dict(RECIPE=recipe, OUT=tmp_path / "out", RUNS=runs)).items():
        monkeypatch.setattr(real_pair, name, value)
    samplers, evaluations = [], []

    def watched_sample(model, *args, **options):
        samplers.append(model.config.hidden_size)
        return sample(model, *args, **options)

    def run_here(words, check):
        """What the command would do; a process of its own would import torch anew for seconds."""
        python, script, *argv = map(str, words)
        assert python == sys.executable and Path(script).parent == ROOT and check
        script = importlib.import_module(Path(script).stem)
        args = parse(script.Args, argv)
        if script == evaluate:
            evaluations.append(args)
        script.main(args)

    monkeypatch.setattr(real_pair, "sample", watched_sample)
    monkeypatch.setattr(real_pair.subprocess, "run", run_here)
    real_pair.main(args)
    sizes = [AutoConfig.from_pretrained(ROOT / "toy" / name).hidden_size for name in ("teacher", "student")]
    assert samplers == sizes * 3 and sizes[0] > sizes[1]  # the teacher's prefixes are by the teacher
    assert [(args.eval_temperature, args.eval_k, args.eval_problems) for args in evaluations] == [(0, 1, 8)] * 2
    table = (real_pair.OUT / "real_pair.md").read_text()
    saved = json.loads((real_pair.OUT / "real_pair.json").read_text())
    assert set(saved["measured"]) == {"untrained", *runs} and set(saved["logs"]) == set(runs)
    assert len(saved["measured"]["untrained"]["responses"]) == 8 and "responses" not in saved["measured"]["mix-seed-1"]
    assert real_pair.tables(**saved) + "\n" == table
    # Nothing is done twice.
    monkeypatch.setattr(real_pair.subprocess, "run", None)
    monkeypatch.setattr(real_pair, "measure_kls", None)
    real_pair.main(args)
    assert (real_pair.OUT / "real_pair.md").read_text() == table
    # ... and nothing is taken for another pair's.
    args.teacher = args.student
    with pytest.raises(SystemExit, match="is of another pair"):
        real_pair.main(args)
    args.eval_data += ",more.jsonl"
    with pytest.raises(SystemExit, match="measures on one set"):
        real_pair.main(args)


def test_intervals_are_of_paired_differences():
    """Problems differ by ten times as much as the two models do: paired, the difference is seen; unpaired it is not."""
    rng = np.random.default_rng(0)
    hard = rng.gamma(1.0, size=64)
    before = [dict(forward=10 * h, tokens=10) for h in hard]
    now = [dict(forward=10 * h - 0.1 - 0.1 * rng.random(), tokens=10) for h in hard]
    text = real_pair.difference(real_pair.ratio(now, "forward"), real_pair.ratio(before, "forward"))
    low, high = (float(x) for x in text.split("[")[1].rstrip("])").split(", "))
    assert -0.018 < low <= high < -0.012
    assert np.std(real_pair.ratio(now, "forward")[1]) > 0.05


def test_the_committed_tables_are_made_of_the_committed_numbers():
    saved = json.loads((ROOT / "figures" / "real_pair.json").read_text())
    tables, text = real_pair.tables(**saved), (ROOT / "docs" / "real_models.md").read_text()
    for table in tables.split("\n\n"):
        assert table in text
