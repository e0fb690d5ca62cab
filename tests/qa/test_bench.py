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
