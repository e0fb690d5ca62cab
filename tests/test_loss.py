"""From rollouts to a gradient: which positions are scored, what a token weighs, and that chunks change nothing."""

import pytest
import torch
import transformers
from conftest import make_checkpoint

from common import as_one_end, forward_kl, make_rollouts, mixed_kl, reverse_kl, sample, uniforms, weighted_kl
from plumbing.fast import Head, _add_matmul
from plumbing.models import Vocab

PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13)]
RESPONSES = [(20, 21, 22), tuple(range(30, 43))]  # 3 and 13 tokens
V = 303


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    paths = make_checkpoint(root / "s", seed=1, tied=False), make_checkpoint(root / "t", hidden=48, seed=2)
    student, teacher = (transformers.AutoModelForCausalLM.from_pretrained(path).eval() for path in paths)
    return student, teacher.requires_grad_(False)


def vocab(size=V):
    return Vocab(size, (302,), pad_id=302)


def rollouts(prompts=PROMPTS, responses=RESPONSES):
    keys = [(0, 1, i) for i in range(len(prompts))]
    return make_rollouts(prompts, responses, [True] * len(prompts), keys, vocab(), "cpu")


def gradient(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def full_logits_loss(divergence, student, teacher, prompts=PROMPTS, responses=RESPONSES):
    """The definition: one sequence at a time, no padding, all logits at once, mean over all response tokens."""
    losses = []
    for prompt, response in zip(prompts, responses):
        ids = torch.tensor([[*prompt, *response]])
        positions = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        losses.append(divergence(student(ids).logits[0, positions], teacher(ids).logits[0, positions]))
    return torch.cat(losses).mean()


DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "mixed": lambda s, t, u=None: mixed_kl(s, t, 0.3, u)}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunked_loss_and_gradient_equal_those_of_full_logits(pair, name, chunk):
    student, teacher = pair
    batch = rollouts()
    loss, entropy = weighted_kl(DIVERGENCES[name], *pair, batch, batch.mask / 16, vocab(), chunk=chunk)
    expected = full_logits_loss(DIVERGENCES[name], *pair)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(student, loss), gradient(student, expected), rtol=1e-4, atol=1e-6)
    assert not entropy.requires_grad and entropy > 0


def test_a_divergence_of_ones_own_goes_through_the_same_call(pair):
    """Any differentiable function of two logit tensors: here total variation, by autograd, chunk by chunk."""

    def total_variation(student_logits, teacher_logits):
        return (student_logits.softmax(-1) - teacher_logits.softmax(-1)).abs().sum(-1) / 2

    batch = rollouts()
    loss, _ = weighted_kl(total_variation, *pair, batch, batch.mask / 16, vocab(), chunk=3)
    expected = full_logits_loss(total_variation, *pair)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(pair[0], loss), gradient(pair[0], expected), rtol=1e-4, atol=1e-6)


def test_scored_positions_are_those_that_predict_the_response(pair, monkeypatch):
    """Prompt of P tokens, response of C with its end token: the rows of d loss / d logits that are not zero are
    exactly P−1 … P+C−2. No prompt token is scored, the first response token and the end token are."""
    student, _ = pair
    batch = rollouts()
    hidden = []
    hook = student.base_model.register_forward_hook(
        lambda m, a, out: (out.last_hidden_state.retain_grad(), hidden.append(out.last_hidden_state)) and None
    )
    loss, _ = weighted_kl(forward_kl, *pair, batch, batch.mask / 16, vocab())
    loss.backward()
    hook.remove()
    student.zero_grad()
    touched = hidden[0].grad.abs().sum(-1) > 0  # (B, P+R), every row from column 0 on
    for row, prompt, response in zip(touched, PROMPTS, RESPONSES):
        P = len(prompt)
        assert row.nonzero()[:, 0].tolist() == list(range(P - 1, P + len(response) - 1))


def test_micro_batches_give_the_same_gradient(pair):
    """Compared as gradients: Adam would hide a wrong scale, and blow rounding up."""
    student, _ = pair
    batch = rollouts(PROMPTS * 2, [RESPONSES[0], RESPONSES[1], RESPONSES[1][:5], RESPONSES[0][:1]])
    grads = []
    for size in (1, 2, 3, 4):
        grad = 0.0
        for micro in batch.split(size):
            loss, _ = weighted_kl(reverse_kl, *pair, micro, micro.mask / batch.mask.sum(), vocab(), "sampled")
            grad = grad + gradient(student, loss)
        grads.append(grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_ends_as_one_goes_through_the_same_call(pair, name, estimator):
    """Any divergence, either estimator: what is compared are the merged distributions."""
    batch = rollouts()
    two_ends = Vocab(V, (7, 302), pad_id=302)
    loss, _ = weighted_kl(DIVERGENCES[name], *pair, batch, batch.mask / 16, two_ends, estimator, "as_one", chunk=5)
    u = uniforms(batch.keys, 13, "estimate")
    rows = iter([u[0, :3], u[1]] if estimator == "sampled" else [])

    def divergence(s, t):
        return DIVERGENCES[name](as_one_end(s, (7, 302)), as_one_end(t, (7, 302)), u=next(rows, None))

    expected = full_logits_loss(divergence, *pair)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(pair[0], loss), gradient(pair[0], expected), rtol=1e-4, atol=1e-6)


def test_in_half_precision_the_head_multiplies_bf16_and_its_gradient_adds_up_in_fp32(pair, monkeypatch):
    student, teacher = pair
    monkeypatch.setattr(student, "autocasts", True, raising=False)
    head = Head(student, vocab())
    assert head.weight.dtype == torch.bfloat16 and head.parameters[0].dtype == torch.float32
    assert Head(teacher.bfloat16(), vocab()).weight.dtype == torch.bfloat16
    batch, results = rollouts(), []
    for half in (True, False):
        student.autocasts = half
        teacher.to(torch.bfloat16 if half else torch.float32)
        assert head(torch.ones(2, 32)).dtype == torch.float32
        loss, _ = weighted_kl(reverse_kl, *pair, batch, batch.mask / 16, vocab(), chunk=3)
        results.append((loss, gradient(student, loss)))
    (half_loss, half_grad), (loss, grad) = results
    assert half_grad.dtype == torch.float32 and 0 < (half_grad - grad).norm() < 0.05 * grad.norm()
    assert half_loss.item() == pytest.approx(loss.item(), rel=0.02)


@pytest.mark.parametrize("half", [True, False])
def test_the_heads_gradient_is_added_up_over_all_rows(half):
    """In bf16 it is formed in blocks of 1,024 of the V rows: more rows than that here, and no whole number of blocks."""
    generator = torch.Generator().manual_seed(0)
    total, a, b = (torch.randn(shape, generator=generator) for shape in ((2500, 3), (2500, 5), (5, 3)))
    a, b = (x.bfloat16() if half else x for x in (a, b))
    expected = total.double() + a.double() @ b.double()
    _add_matmul(total, a, b)
    torch.testing.assert_close(total.double(), expected, rtol=0.01 if half else 1e-5, atol=0.05 if half else 1e-5)
    assert total.dtype == torch.float32


def test_no_head_runs_for_a_position_that_is_not_scored(pair, monkeypatch):
    """The body is asked for hidden states; the model with its LM head, which costs V·H a position, is not called."""
    student, teacher = pair
    for model in pair:
        monkeypatch.setattr(model, "forward", None)
        monkeypatch.setattr(model.lm_head, "forward", None)
    batch = rollouts()
    weighted_kl(forward_kl, student, teacher, batch, batch.mask / 16, vocab())
    sample(student, PROMPTS, [(0, 0, 0), (0, 0, 1)], vocab(), 3)


def test_split_keeps_every_row_once_and_trims_padding():
    batch = rollouts(PROMPTS * 2, [RESPONSES[0], RESPONSES[1], RESPONSES[1][:5], RESPONSES[0][:1]])
    micros = list(batch.split(2))
    assert sorted(key for m in micros for key in m.keys) == batch.keys
    by_key = {key: ids for m in micros for key, ids in zip(m.keys, m.responses())}
    assert [by_key[key] for key in batch.keys] == batch.responses()
    assert micros[0].mask.shape[1] == 3 and micros[1].mask.shape[1] == 13


@pytest.mark.parametrize("name", ["forward", "reverse"])
def test_the_sampled_estimator_through_the_model_is_unbiased(pair, name):
    """Mean over 150 draws of u of loss and gradient, within 5 standard errors of the exact ones."""
    student, _ = pair
    batch = rollouts([PROMPTS[0]], [RESPONSES[0][:2]])
    loss, _ = weighted_kl(DIVERGENCES[name], *pair, batch, batch.mask / 2, vocab())
    exact = torch.cat([loss.detach()[None], gradient(student, loss)])
    draws = []
    for i in range(150):
        batch.keys = [(i,)]
        loss, _ = weighted_kl(DIVERGENCES[name], *pair, batch, batch.mask / 2, vocab(), "sampled")
        draws.append(torch.cat([loss.detach()[None], gradient(student, loss)]))
    draws = torch.stack(draws)
    direction = torch.randn(draws.shape[1], 8, generator=torch.Generator().manual_seed(0))
    direction[:, 0], direction[0, 0] = 0.0, 1.0  # the loss itself; the other seven mix all parameters
    errors = (draws - exact) @ direction
    assert (errors.mean(0).abs() < 5 * errors.std(0) / 150**0.5).all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["Qwen3", "Llama", "Gemma2", "Phi"])
def test_heads_tied_or_not_with_bias_or_soft_cap(arch, tied, tmp_path):
    """Gemma 2 caps its logits, Phi's head has a bias; our head must be the model's own head in each case."""
    extra = {"final_logit_softcapping": 5.0, "head_dim": 8} if arch == "Gemma2" else {}
    path = make_checkpoint(tmp_path, arch=arch, tied=tied, seed=4, **extra)
    student = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    teacher = transformers.AutoModelForCausalLM.from_pretrained(
        make_checkpoint(tmp_path / "t", arch=arch, tied=tied, **extra)
    )
    teacher.eval().requires_grad_(False)
    batch = rollouts()
    loss, _ = weighted_kl(reverse_kl, student, teacher, batch, batch.mask / 16, vocab(), chunk=4)
    expected = full_logits_loss(reverse_kl, student, teacher)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient(student, loss), gradient(student, expected), rtol=1e-3, atol=1e-5)


def test_padded_vocabularies_are_cropped_to_the_tokenizer(pair, tmp_path):
    """Same tokenizer, teacher with 17 more embedding rows: compared over the 303 ids that a tokenizer can produce."""
    student, _ = pair
    padded = transformers.AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path, padded=17, seed=2)).eval()
    batch = rollouts()
    loss, _ = weighted_kl(reverse_kl, student, padded, batch, batch.mask / 16, vocab(303))
    expected = full_logits_loss(lambda s, t: reverse_kl(s, t[:, :303]), student, padded)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
