"""bench/bench.py: all contestants do the same work, in the precision asked for, with the same loss and gradient."""

import pytest
import torch
from conftest import make_checkpoint
from torch.nn.utils import get_total_norm as norm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP as MLP

from bench import bench
from common import distillation_loss, make_rollouts, reverse_kl


def case(preset, student=(64, 192, 2, 2, 1, 32), teacher=(128, 384, 2, 4, 2, 32), **more):
    return bench.case_of(preset, student=student, teacher=teacher, max_new_tokens=8, threads=1, **more)


def gradient_of(loss, batch, student, teacher, vocab_size=256):
    value, _ = loss(reverse_kl, student, teacher, batch, batch.mask / batch.mask.sum(), vocab_size=vocab_size)
    return value.detach(), torch.autograd.grad(value, list(student.parameters()))


@pytest.mark.parametrize("contestant", ["ours", "plain"])
def test_a_pair_of_checkpoints_does_the_same_work_in_bf16(contestant, tmp_path, monkeypatch):
    """measure() fails where a response ends early: to these checkpoints, nearly every token is an end token."""
    pair = {role: make_checkpoint(tmp_path / role, eos_token_id=list(range(1, 300))) for role in ("student", "teacher")}
    f, seen = MLP.forward, set()
    monkeypatch.setattr(MLP, "forward", lambda *x: seen.add((torch.is_grad_enabled(), f(*x).dtype)) or f(*x))
    monkeypatch.setattr(bench.opd, "check_models", lambda *models: None)  # it reads the student in fp32, too
    (seconds, rollout), memory, loss = bench.measure(contestant, case("pair", precision="bf16", **pair))
    assert seen == {(False, torch.bfloat16), (True, torch.bfloat16)}
    assert 0 < rollout < seconds and memory > 0 and abs(loss) < 1e-3  # the two are the same model


def test_plain_has_our_loss_and_gradient():
    """On the same responses, with logits beyond the tokenizer's."""
    small = case("toy", precision="fp32")
    student, teacher = (bench.load_model(small, None, shape, "fp32") for shape in (small.student, small.teacher))
    batch = bench.plain_sample(student.requires_grad_(), bench.random_prompts(small, 0), max_new_tokens=8, seed=0)
    assert [x.tolist() for x in batch.lengths()] == [[8] * 16, [32, 16] * 8] and batch.ids[:, :16].min() > 0
    ours, plain = (gradient_of(f, batch, student, teacher, 250) for f in (distillation_loss, bench.plain_loss))
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision, rtol", [("fp32", 1e-4), ("bf16", 1e-2)])
def test_trl_has_our_loss_and_gradient_in_its_first_micro_batch_of_two(precision, rtol, monkeypatch):
    """In bf16 it computes the student's part in fp32: its loss goes past the forward pass that is under autocast."""
    trl, seen = pytest.importorskip("trl", reason="see bench/requirements.txt"), []

    def watched(trainer, model, inputs, *args, step=trl.DistillationTrainer.training_step):
        loss, found = step(trainer, model, inputs, *args), trainer._buffered_inputs[0]
        prompts = [ids[mask > 0].tolist() for ids, mask in zip(found["prompt_ids"], found["prompt_mask"])]
        batch, model.autocasts = make_rollouts(prompts, found["completion_ids"].tolist(), [False] * 8, "cpu"), False
        ours, gradient = gradient_of(distillation_loss, batch, model, trainer.teacher_model)
        error = norm([2 * p.grad - g for p, g in zip(model.parameters(), gradient)]) / norm(gradient)
        seen.append(max(abs(2 * loss / ours - 1), error / 10, abs(len(prompts) - 8)))  # half of the batch
        return loss

    monkeypatch.setattr(trl.DistillationTrainer, "training_step", watched)
    bench.measure("trl", case("toy", precision=precision, micro_batch_size=8))
    assert seen[0] < rtol
