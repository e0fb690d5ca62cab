"""bench/bench.py: all contestants do the same work on the same loss, and the table says what was measured."""

import importlib.util

import pytest
import torch
import transformers
from conftest import make_checkpoint

from bench import bench
from common import distillation_loss, make_rollouts, reverse_kl

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="optional: bench/requirements.txt")
SMALL = dict(student=(64, 192, 2, 2, 1, 32), teacher=(128, 384, 2, 4, 2, 32), max_new_tokens=8, prompt_len=8, steps=1)


def case(preset="toy", precision="fp32", **changes):
    return bench.case_of(preset, precision=precision, threads=1, **SMALL | changes)


@pytest.mark.parametrize("contestant", ["ours", "plain"])
def test_checkpoints_have_no_say_in_where_a_response_ends(contestant, tmp_path):
    """measure() fails where a response ends early: nearly every token of these ends one."""
    pair = {role: make_checkpoint(tmp_path / role, eos_token_id=list(range(1, 300))) for role in ("student", "teacher")}
    (seconds, rollout), memory, loss = bench.measure(contestant, case("pair", **pair))
    assert 0 < rollout < seconds and memory > 0 and abs(loss) < 1e-6  # the two are the same model


@pytest.mark.parametrize("contestant", ["ours", "plain"])
def test_bf16_is_trained_in_bf16(contestant, monkeypatch):
    seen, load = set(), bench.load_model

    def watched(*args):
        model = load(*args)
        look = lambda module, inputs, output: seen.add((torch.is_grad_enabled(), output.dtype))
        model.model.layers[0].mlp.down_proj.register_forward_hook(look)
        return model

    monkeypatch.setattr(bench, "load_model", watched)
    bench.measure(contestant, case("h200", "bf16", vocab=300))
    assert seen - {(False, torch.float32)} == {(False, torch.bfloat16), (True, torch.bfloat16)}  # fp32: check_models


def losses_and_gradients(batch, student, teacher, losses, **options):
    weights = batch.mask / batch.mask.sum()
    found = [loss(reverse_kl, student, teacher, batch, weights, **options)[0] for loss in losses]
    return [[loss.detach(), *torch.autograd.grad(loss, list(student.parameters()))] for loss in found]


@pytest.mark.parametrize("cut", [None, 250])
def test_plain_has_our_loss_and_gradient(cut):
    """Given the same responses to prompts of two lengths. (What it draws are other numbers.)"""
    small = case(vocab=256)
    student, teacher = (bench.load_model(small, None, shape, "fp32") for shape in (small.student, small.teacher))
    prompts = bench.random_prompts(small, step=0)
    assert prompts == bench.random_prompts(small, step=0) != bench.random_prompts(small, step=1)
    assert [len(prompt) for prompt in prompts] == [8, 4] * 8 and min(map(min, prompts)) > 0
    batch = bench.plain_sample(student.requires_grad_(), prompts, max_new_tokens=8, seed=0)
    assert batch.mask.sum() == 16 * 8 and [len(ids) for ids in batch.responses()] == [8] * 16
    losses = (distillation_loss, bench.plain_loss)
    for ours, plain in zip(*losses_and_gradients(batch, student, teacher, losses, vocab_size=cut)):
        torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-6)


@needs_trl
@pytest.mark.parametrize("precision, rtol", [("fp32", 1e-4), ("bf16", 1e-2)])
def test_trl_has_our_loss_and_gradient(precision, rtol, monkeypatch):
    """In its first step. In bf16 it computes the student's part in fp32, past the forward pass that is wrapped."""
    import trl

    step, small = trl.DistillationTrainer.training_step, case(precision=precision, micro_batch_size=8)
    seen = []

    def checked(trainer, model, inputs, *args):
        loss, found = step(trainer, model, inputs, *args), trainer._buffered_inputs[0]
        if not seen:
            prompts = [ids[mask > 0].tolist() for ids, mask in zip(found["prompt_ids"], found["prompt_mask"])]
            batch = make_rollouts(prompts, found["completion_ids"].tolist(), [False] * 8, model.device)
            model.autocasts = False
            ours, *gradient = losses_and_gradients(batch, model, trainer.teacher_model, [distillation_loss])[0]
            seen.append((2 * loss / ours, [2 * p.grad - g for p, g in zip(model.parameters(), gradient)], gradient))
        return loss

    monkeypatch.setattr(trl.DistillationTrainer, "training_step", checked)
    bench.measure("trl", small)
    (ratio, differences, gradient), norm = seen[0], torch.nn.utils.get_total_norm
    assert abs(ratio - 1) < rtol and norm(differences) < 10 * rtol * norm(gradient)
