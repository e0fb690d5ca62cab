"""bench/bench.py: that it runs, that what it times is opd.py's step, and that TRL's loss is ours where TRL is there."""

import importlib.util
import json
import re

import pytest
import torch
import transformers
from conftest import ROOT, arguments_of, make_checkpoint, run

import opd
from bench import bench, operators, precision
from plumbing import runs

PHASES = {"rollout", "teacher", "student", "update"}
contestants = pytest.mark.parametrize("contestant", ["ours", "plain"])
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="optional: bench/requirements.txt")


def case(preset, **changes):
    return bench.resolved(bench.Case(preset, **dict(device="cpu", steps=1) | changes))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two checkpoints that sample and end in their own ways; none of it may have a say."""
    root = tmp_path_factory.mktemp("pair")
    paths = dict(
        student=make_checkpoint(root / "student", seed=1),
        teacher=make_checkpoint(root / "teacher", hidden=48, seed=2, tied=False),
    )
    for path in paths.values():
        own = transformers.GenerationConfig(eos_token_id=list(range(1, 300)), do_sample=True, top_k=2, top_p=0.5)
        own.save_pretrained(path)
    return paths


def test_our_side_prints_a_table_and_writes_its_measurements(capsys, tmp_path):
    out = tmp_path / "measured.jsonl"
    bench.main(bench.Case("toy", device="cpu", contestants="ours", max_new_tokens=8, repeats=1, steps=2, out=str(out)))
    printed = capsys.readouterr().out
    assert "preset='toy', vocab=256, student='128x2', teacher='256x4', batch_size=16, prompt_len=32" in printed
    assert "precision='fp32'" in printed
    head, rule, row = (line for line in printed.splitlines() if line.startswith("|"))
    assert row.startswith("| ours | 0.") and head.count("|") == rule.count("|") == row.count("|")
    (record,) = map(json.loads, out.read_text().splitlines())
    assert {"machine", "date", "torch", "transformers", "student", "precision", "loss"} <= record.keys()
    assert set(record["seconds"]) == PHASES and all(seconds > 0 for seconds in record["seconds"].values())
    assert record["peak"] > 0 and len(record["steps"]) == 2
    assert min(record["steps"]) == pytest.approx(sum(record["seconds"].values()))
    assert f"ours: 2 steps in {sum(record['steps']):.4g} CPU-s" in printed


@contestants
@pytest.mark.parametrize("preset", ["mid-bf16", "h200"])
def test_bf16_on_a_cpu_computes_in_bf16(preset, contestant, monkeypatch):
    """The student's matrices are multiplied in bf16 when it samples and when it is trained; its weights stay fp32."""
    seen, build = set(), bench.build

    def watched(case):
        models = build(case)
        assert [next(model.parameters()).dtype for model in models] == [torch.float32, torch.bfloat16]
        mlp = models[0].model.layers[0].mlp.down_proj
        mlp.register_forward_hook(lambda module, inputs, output: seen.add((torch.is_grad_enabled(), output.dtype)))
        return models

    monkeypatch.setattr(bench, "build", watched)
    record = bench.measure(contestant, case(preset, shrink=True))
    assert record["loss"] > 0 and set(record["seconds"]) == PHASES
    assert seen == {(False, torch.bfloat16), (True, torch.bfloat16)}


@contestants
def test_a_pair_of_checkpoints(pair, contestant):
    both = case("pair", max_new_tokens=8, **pair)
    assert (both.vocab, both.batch_size, both.micro_batch_size, both.prompt_len) == (303, 8, 4, 96)
    record = bench.measure(contestant, both)  # fails where a response ends early
    assert record["loss"] > 0 and set(record["seconds"]) == PHASES
    student = bench.build(both)[0]
    saved = transformers.AutoModelForCausalLM.from_pretrained(pair["student"], dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), saved.parameters(), strict=True))


@pytest.mark.parametrize(
    "argv, says",
    [
        ("--preset pair --teacher toy/teacher", "--preset pair needs --student and --teacher"),
        ("--preset pair --student toy/student", "--preset pair needs --student and --teacher"),
        ("--contestants ours,verl", "--contestants has verl"),
    ],
)
def test_refused_in_one_line(argv, says):
    with pytest.raises(SystemExit, match=says) as refused:
        bench.main(runs.parse(bench.Case, argv.split()))
    assert "\n" not in str(refused.value)


def test_plain_computes_the_same_loss_and_gradient():
    """Given the same responses to ragged prompts. (What it draws are other numbers.)"""
    small = case("toy", shrink=True)
    student, teacher = bench.build(small)
    vocab = bench.Vocab(small.vocab, (), 0)
    prompts = bench.random_prompts(small, step=0)
    assert prompts == bench.random_prompts(small, step=0) != bench.random_prompts(small, step=1)
    assert all(0 < token < 256 for prompt in bench.random_prompts(case("toy"), step=0) for token in prompt)
    torch.manual_seed(0)
    rollouts = bench.plain_sample(student, prompts, [()] * len(prompts), vocab, 8)
    assert rollouts.ids.shape == (16, 16) and rollouts.mask.all()
    assert rollouts.prompt_mask.sum(1).tolist() == [8, 4] * 8 == [len(prompt) for prompt in prompts]
    weights, results = rollouts.mask / rollouts.mask.sum(), []
    for loss in (bench.weighted_kl, bench.plain_kl):
        value, _ = loss(bench.reverse_kl, student, teacher, rollouts, weights, vocab, None, "apart")
        results.append([value.detach(), *torch.autograd.grad(value, list(student.parameters()))])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-6)


@contestants
def test_head_and_kl_alone(contestant, monkeypatch, capsys):
    """In small; and the command measures three numbers of tokens."""
    small = case("real", shrink=True, kl_only=True)
    assert len(bench.build(small)[0].model.layers) == 0
    assert bench.measure(contestant, small)["loss"] > 0
    measured = []
    monkeypatch.setattr(bench, "report", lambda case, records: measured.append(case.batch_size * case.max_new_tokens))
    bench.main(bench.Case("real", kl_only=True, repeats=0))
    assert measured == [512, 1024, 4096]


def test_what_is_timed_are_the_lines_of_opd_py():
    scripts = [(ROOT / path).read_text().split("\n") for path in ("opd.py", "bench/bench.py")]
    opd, ours = ({line.split("  # ")[0].strip() for line in lines} for lines in scripts)
    for beginning in (
        "optimizer = ", "rollouts = ", "n_tokens = ", "for micro ", "token_weights = ", "micro_loss, ", "reverse_kl, ",
        "micro_loss.", "loss, ", "grad_norm = ", "optimizer.step", "optimizer.zero",
    ):  # fmt: skip
        assert [line for line in opd & ours if line.startswith(beginning)], f"no line {beginning!r} in both"


def test_the_models_of_the_gpu_preset_have_the_published_sizes():
    for name, parameters in {"0.6B": 596_049_920, "4B": 4_022_468_096, "8B": 8_190_735_360}.items():
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(bench.model_config(name, case("h200")))
        assert model.num_parameters() == parameters


def test_the_table_takes_the_fastest_step_and_the_median_memory(capsys):
    def row(seconds, mib, **more):
        seconds = dict(rollout=seconds, teacher=0, student=0, update=0)
        return dict(seconds=seconds, peak=mib * 2**20, baseline=0, **more)

    trl = [row(10.0, 10, loss=1.0, our_loss=1.0, loss_error=0.0, gradient_error=0.0)]
    bench.report(case("real"), dict(ours=[row(9.0, 9), row(7.0, 2), row(8.0, 5)], trl=trl))
    assert "| ours | 7 | 0 | 0 | 0 | 7 | 5 | 5 | 0.7 | 0.5 |" in capsys.readouterr().out


def test_what_bf16_does_is_measured_against_fp32(world, capsys):
    precision.main(opd.Args(**arguments_of("opd", world)))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    errors = {(name.lstrip("| "), kind): float(error.rstrip("% |")) for name, kind, _, _, error in rows}
    for kl in ("forward_kl", "reverse_kl"):
        assert errors[kl, "fp32"] == 0 < errors[kl, "teacher only"] < errors[kl, "as trained"] < 10


def test_a_step_of_a_script_is_taken_apart(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs.Run, "steps", operators.profiled(runs.Run.steps))
    run("opd", **arguments_of("opd", world, steps=2, eval_data="none"), out_dir=tmp_path / "run")
    printed = capsys.readouterr().out
    shares = [float(share) for share in re.findall(r"^\| `\w+::\w+` \| ([\d.]+)%", printed, re.M)]
    assert "`aten::mm`" in printed and 40 < sum(shares) <= 100


@needs_trl
def test_trl_has_the_same_loss(capsys):
    """Every measurement of TRL compares loss and gradient with ours, and fails where they differ."""
    bench.main(bench.Case("toy", device="cpu", shrink=True, contestants="ours,trl", repeats=1, steps=1))
    printed = capsys.readouterr().out
    assert "| trl | " in printed and "trl and ours on the same responses" in printed


@needs_trl
def test_trl_has_the_same_loss_on_a_pair_of_checkpoints_and_in_bf16(pair):
    for one, tolerance in ((case("pair", max_new_tokens=8, **pair), 1e-4), (case("mid-bf16", shrink=True), 1e-2)):
        record = bench.measure("trl", one)
        assert record["loss_error"] < tolerance and record["gradient_error"] < 10 * tolerance
        assert set(record["seconds"]) == PHASES


@needs_trl
@pytest.mark.parametrize("what", ["loss_error", "gradient_error"])
def test_another_loss_is_noticed_and_another_gradient_of_the_same_loss(what, monkeypatch):
    ours = bench.weighted_kl

    def faulty(divergence, *args):
        if what == "loss_error":
            return ours(ours.__globals__["forward_kl"], *args)
        loss, entropy = ours(divergence, *args)
        return 2 * loss - loss.detach(), entropy

    monkeypatch.setattr(bench, "weighted_kl", faulty)
    with pytest.raises(AssertionError, match=what):
        bench.measure("trl", case("toy", shrink=True))
