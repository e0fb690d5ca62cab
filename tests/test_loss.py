"""From rollouts to a gradient: which positions are scored, what a token weighs, and that chunks change nothing."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_checkpoint, rollouts_of
from transformers import AutoModelForCausalLM

import common
from common import distillation_loss, entropy, forward_kl, merge_ends, reverse_kl
from plumbing.models import sequence_flops

PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13)]
RESPONSES = [[20, 0, 302], list(range(30, 43))]  # 3 tokens, one of which looks like padding and one is an end; 13
FOUR_PROMPTS, FOUR_RESPONSES = PROMPTS * 2, [*RESPONSES, RESPONSES[1][:5], RESPONSES[0][:1]]
V = 303


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(make_checkpoint(path, **options)).eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    return load(root / "s", seed=1, tied=False), load(root / "t", hidden=48, seed=2)


@pytest.fixture
def batch():
    return rollouts_of(PROMPTS, RESPONSES)


def gradient(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def definition(divergence, pair, weights=None, prompts=PROMPTS, responses=RESPONSES):
    """Σ weights · divergence and Σ weights · H(q), one sequence at a time, without padding, all logits at once.
    weights: B tensors, one number for each response token. Without them: the mean over all response tokens."""
    losses, entropies = [], []
    for prompt, response in zip(prompts, responses):
        q, p = (model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] for model in pair)
        losses.append(divergence(q, p))
        entropies.append(entropy(q.detach()))
    losses, entropies = torch.cat(losses), torch.cat(entropies)
    weights = torch.full_like(losses, 1 / len(losses)) if weights is None else torch.cat(weights)
    return (weights * losses).sum(), (weights * entropies).sum()


def assert_same(model, loss, expected):
    """In value and in gradient. Compared as gradients: Adam would hide a wrong scale, and blow rounding up."""
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(model, 3 * loss), gradient(model, 3 * expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, lambda s, t: (s - t).square().mean(-1)])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunked_loss_and_gradient_equal_those_of_full_logits(pair, batch, divergence, chunk):
    """Every token with a weight of its own; any differentiable function of two logit tensors. What a token that is no
    response token weighs is not looked at. Only the student gets a gradient."""
    token_weights = torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    loss, mean_entropy = distillation_loss(divergence, *pair, batch, token_weights, end_ids=(7, 302), chunk=chunk)
    expected, expected_entropy = definition(divergence, pair, [token_weights[0, 3:6], token_weights[1, 6:19]])
    assert_same(pair[0], loss, expected)
    torch.testing.assert_close(mean_entropy, expected_entropy)
    assert loss.requires_grad and not mean_entropy.requires_grad
    assert set(torch.autograd.grad(loss, list(pair[1].parameters()), allow_unused=True)) == {None}


def test_scored_positions_are_those_that_predict_the_response(pair, batch):
    """Prompt of P tokens, response of C with its end token: the hidden states that get a gradient are exactly those of
    P−1 … P+C−2. No prompt token is scored, the first response token and the end token are."""
    hidden = []
    hook = pair[0].base_model.register_forward_hook(lambda m, args, out: hidden.append(out.last_hidden_state))
    loss, _ = distillation_loss(forward_kl, *pair, batch, batch.mask / 16)
    hook.remove()
    (grad,) = torch.autograd.grad(loss, hidden)
    assert [row.nonzero()[:, 0].tolist() for row in grad.abs().sum(-1)] == [list(range(2, 5)), list(range(5, 18))]


def test_micro_batches_of_any_size_give_the_mean_over_all_response_tokens(pair, batch):
    """3 tokens with a KL of 1 and 13 with one of .2 have a mean of .35; a mean of micro-batches' means says .6."""
    for size in (1, 2, 3, 4):
        micros = rollouts_of(FOUR_PROMPTS, FOUR_RESPONSES).split(size)
        losses = [distillation_loss(reverse_kl, *pair, m, m.mask / 22)[0] for m in micros]
        assert_same(pair[0], sum(losses), definition(reverse_kl, pair, None, FOUR_PROMPTS, FOUR_RESPONSES)[0])
    given = lambda s, _: 0 * s.sum(-1) + (1.0 if len(s) == 3 else 0.2)
    assert sum(distillation_loss(given, *pair, m, m.mask / 16)[0] for m in batch.split(1)).item() == pytest.approx(0.35)


def test_what_stands_in_the_padding_and_how_much_of_it_there_is_changes_nothing(pair, batch):
    """Padding is marked by a mask, never by an id."""
    assert batch.responses() == RESPONSES and [x.tolist() for x in batch.lengths()] == [[3, 13], [3, 6]]
    batch.ids[0, 6:] = 99
    batch.ids, batch.mask = F.pad(batch.ids, (0, 7), value=98), F.pad(batch.mask, (0, 7))
    loss, _ = distillation_loss(reverse_kl, *pair, batch, batch.mask / 16)
    assert_same(pair[0], loss, definition(reverse_kl, pair)[0])


def test_split_keeps_every_row_once_sorts_by_length_and_trims_padding():
    batch = rollouts_of(FOUR_PROMPTS, FOUR_RESPONSES)
    batch.ended = torch.tensor([True, False, False, True])
    for micro, rows, width in zip(batch.split(3), ([0, 3, 2], [1]), (8, 19), strict=True):
        assert micro.rows.tolist() == rows and micro.ids.shape[1] == width
        assert micro.lengths()[1].tolist() == [len(FOUR_PROMPTS[i]) for i in rows]
        assert micro.responses() == [FOUR_RESPONSES[i] for i in rows]
        assert micro.ended.tolist() == batch.ended[rows].tolist()


def test_a_batch_without_response_tokens_has_a_loss_and_a_gradient_of_zero(pair):
    """Under FSDP a process that has none must go through the model all the same, forwards and backwards."""
    batch = rollouts_of(PROMPTS, [[], []])
    loss, mean_entropy = distillation_loss(reverse_kl, *pair, batch, batch.mask / 16)
    assert loss == mean_entropy == 0 and not gradient(pair[0], loss).any()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "sampled_forward_kl", "sampled_reverse_kl"])
def test_ends_as_one_compares_the_merged_distributions_and_chunks_draw_one_stream_of_numbers(pair, batch, name):
    divergence, ends = getattr(common, name), (7, 302)
    torch.manual_seed(0)
    loss, _ = distillation_loss(divergence, *pair, batch, batch.mask / 16, ends, "as_one", chunk=5)
    torch.manual_seed(0)
    expected, _ = definition(lambda s, t: divergence(merge_ends(s, ends), merge_ends(t, ends)), pair)
    assert_same(pair[0], loss, expected)


def test_in_half_precision_the_head_multiplies_bf16_and_its_gradient_adds_up_in_fp32(pair, batch, monkeypatch):
    """The sum over chunks of one token is compared with the gradients of 16 losses, each of which counts one token."""
    loss, _ = distillation_loss(reverse_kl, *pair, batch, batch.mask / 16)
    exact = gradient(pair[0], loss)
    for model in pair:
        monkeypatch.setattr(model, "autocasts", True, raising=False)
    half_loss, _ = distillation_loss(reverse_kl, *pair, batch, batch.mask / 16, chunk=1)
    assert common.head_of(pair[0])[0].dtype == torch.bfloat16 and half_loss.dtype == torch.float32
    assert half_loss.item() == pytest.approx(loss.item(), rel=0.02)
    assert 0 < (gradient(pair[0], half_loss) - exact).norm() < 0.05 * exact.norm()

    def of_head(token_weights):
        loss, _ = distillation_loss(reverse_kl, *pair, batch, token_weights, chunk=1)
        return torch.autograd.grad(loss, pair[0].lm_head.weight)[0]

    parts = [of_head(torch.zeros(batch.mask.shape).index_put_((i, t), torch.ones(()))) for i, t in batch.mask.nonzero()]
    torch.testing.assert_close(of_head(batch.mask * 1.0), sum(parts), rtol=1e-4, atol=1e-6)


def test_no_head_runs_for_a_position_that_is_not_scored_and_none_for_more_than_a_chunk(pair, batch, monkeypatch):
    """The model with its LM head, which costs V·H a position, is not called: its body is."""
    for model in pair:
        monkeypatch.setattr(model, "forward", None)
        monkeypatch.setattr(model.lm_head, "forward", None)
    shapes = []
    divergence = lambda s, t: (shapes.append((*s.shape, *t.shape)), forward_kl(s, t))[1]
    distillation_loss(divergence, *pair, batch, batch.mask / 16, chunk=6)
    assert shapes == [(n, V, n, V) for n in (6, 6, 4)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["Qwen3", "Llama", "Gemma2", "Phi"])
def test_heads_tied_or_not_with_bias_or_soft_cap_cropped_to_the_tokenizers_vocabulary(arch, tied, batch, tmp_path):
    """Gemma 2 caps its logits, Phi's head has a bias. Both models have more rows than the tokenizer has ids, and not
    equally many: what is compared are the ids that can occur."""
    extra = {"final_logit_softcapping": 5.0, "head_dim": 8} if arch == "Gemma2" else {}
    pair = [load(tmp_path / str(n), arch=arch, tied=tied, seed=n, padded=n, **extra) for n in (4, 17)]
    loss, _ = distillation_loss(reverse_kl, *pair, batch, batch.mask / 16, vocab_size=V, chunk=4)
    assert_same(pair[0], loss, definition(lambda s, t: reverse_kl(s[:, :V], t[:, :V]), pair)[0])


def test_a_teachers_responses_are_cut_to_the_training_length_and_cost_what_sampling_them_once_uncut_does(pair):
    batch = SimpleNamespace(prompts=PROMPTS * 2, responses=RESPONSES * 2, ended=[True, True, False, True])
    batch.first_use = [False, True, True, False]
    for n, ended in ((13, [True, True, False, True]), (3, [True, False, False, False]), (2, [False] * 4)):
        rollouts = common.teacher_rollouts(pair[1], batch, n)
        assert rollouts.responses() == [ids[:n] for ids in RESPONSES * 2] and rollouts.ended.tolist() == ended
        assert rollouts.flops == sequence_flops(pair[1], torch.tensor([13, 3]), torch.tensor([6, 3]))
