"""The KL math of common.py against the definition, Σ p ln(p/q) with p = e^z / Σ e^z, in 60 decimal digits.

That shares no trick with the code: no log-softmax, no shift by the maximum: e^10000 is an ordinary number there.
"""

import itertools
from decimal import Context, Decimal, localcontext
from math import inf, log

import pytest
import torch

import common
from common import draw, entropy, forward_kl, merge_ends, mixed_kl, pass_at_k, reverse_kl, seed_of

# What each precision can promise: (rtol, atol). The gradient comes back in the input's precision, hence bf16's.
TOLERANCE = {torch.bfloat16: (8e-3, 1e-6), torch.float32: (1e-5, 1e-6), torch.float64: (1e-10, 1e-11)}


def reference(student, teacher, lam):
    """λ KL(q‖p) + (1 − λ) KL(p‖q) of (V,) logits, and its gradient (V,) by central differences, with 0 ln 0 = 0."""

    def definition(*logits):
        exps = [[x.exp() for x in one] for one in logits]
        q, p = ([e / sum(one) for e in one] for one in exps)
        parts = ((Decimal(lam), q, p), (1 - Decimal(lam), p, q))
        return sum(share * x * (x / y).ln() for share, a, b in parts if share for x, y in zip(a, b) if x > 0)

    with localcontext(Context(prec=60, traps=[])):  # no traps: dividing by zero is infinity
        z, w = ([Decimal(x) for x in logits.tolist()] for logits in (student, teacher))
        h = Decimal("1e-20")
        moved = ([definition([*z[:i], z[i] + by, *z[i + 1 :]], w) for by in (h, -h)] for i in range(len(z)))
        value, grad = float(definition(z, w)), [float((up - down) / (2 * h)) for up, down in moved]
    return torch.tensor(value, dtype=torch.float64), torch.tensor(grad, dtype=torch.float64)


def value_and_grad(divergence, student, *args):
    student = student.detach().clone().requires_grad_()
    value = divergence(student, *args)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


def random_logits(*shape, scale=2.0, seed=0, dtype=torch.float64):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def assert_same(a, b, rtol=0, atol=1e-12):
    torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)  # a NaN is not close to anything


@pytest.mark.parametrize("divergence, value, slope", [(forward_kl, 0.226289, 0.3), (reverse_kl, 0.311239, 0.430022)])
def test_teacher_90_10_student_60_40(divergence, value, slope):
    """Small enough for a pocket calculator: .9 ln(.9/.6) + .1 ln(.1/.4), and the same with the two exchanged."""
    student, teacher = (torch.tensor(probs, dtype=torch.float64).log() for probs in ([0.6, 0.4], [0.9, 0.1]))
    got, grad = value_and_grad(divergence, student, teacher)
    assert [got.item(), *grad.tolist()] == pytest.approx([value, -slope, slope], abs=1e-6)


CASES = {  # student's logits, teacher's logits
    "ordinary": ([1.5, -2.0, 0.5], [-1.0, 0.75, 2.0]),
    "far from uniform": ([25.0, -10.0, 3.0], [-5.0, 15.0, 20.0]),
    "opposite peaks": ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]),
    "impossible to both, opposite peaks": ([1e4, -inf, -1e4], [-1e4, -inf, 1e4]),
    "impossible to the teacher": ([1.0, 0.0, 3.0], [-inf, 1.0, 2.0]),  # 0 ln(0/q) = 0, but q ln(q/0) = ∞
    "impossible to the student": ([-inf, 1.0, 2.0], [1.0, 0.0, 3.0]),
}


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_match_the_definition_on_ordinary_and_on_hostile_logits(case, dtype, lam):
    """Finite wherever the definition is, and affine in λ: λ = 0 and 1 must not touch the other direction's infinity,
    and the generalised JSD of GKD would go to 0 there. A second row, equal on both sides, costs 0: cross-entropy, which
    lacks the teacher's entropy, fails there. Entropy is what KL(q‖uniform) is less than ln V."""
    student, teacher = (torch.tensor([[logits], [[-inf, 2, 1]]], dtype=dtype) for logits in CASES[case])
    results, wanted = value_and_grad(mixed_kl, student, teacher, lam), reference(student[0, 0], teacher[0, 0], lam)
    for got, want in zip(results, wanted):
        if wanted[0] < inf:
            assert_same(got, torch.stack([want, want * 0])[:, None], *TOLERANCE[got.dtype])
        else:
            assert results[0][0] > 1e30
    assert_same(entropy(student), log(3) - reverse_kl(student, student.new_zeros(3)), *TOLERANCE[results[0].dtype])
    drawn = value_and_grad(common.sampled_mixed_kl, student.expand(2, 20, 3), teacher.expand(2, 20, 3), lam)
    assert all(x.isfinite().all() for x in drawn)


@pytest.mark.parametrize("compared", [lambda x: x, lambda x: merge_ends(x, (7, 11))], ids=["ends apart", "as one"])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_half_precision_logits_over_a_real_vocabulary_match_fp64(compared, lam):
    """A true KL near .001 over 151,936 tokens is what late training looks like, and where bf16 arithmetic is useless.
    The logits are rounded to bf16 first, for fp64 too: it is the arithmetic that is tested, not the input."""
    teacher, noise = random_logits(3, 151_936, seed=1), random_logits(3, 151_936, scale=0.05, seed=2)
    teacher[:, [7, 11]] += 12.0  # two probable ends: their sum must not be rounded to bf16 either
    (value, grad), (want_value, want_grad) = (
        value_and_grad(lambda s: mixed_kl(compared(s), compared(teacher.bfloat16().to(s.dtype)), lam), student)
        for student in ((teacher + noise).bfloat16(), (teacher + noise).bfloat16().double())
    )
    assert ((2e-4 < want_value) & (want_value < 3e-3)).all()
    assert_same(value, want_value, atol=1e-5)
    assert (grad.double() - want_grad).norm() < 0.004 * want_grad.norm()  # bf16 keeps 8 bits: half a unit is .2-.4 %


@pytest.mark.parametrize("dtype", [torch.float16, *TOLERANCE], ids=str)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "sampled_forward_kl", "sampled_reverse_kl", "entropy"])
def test_results_are_unreduced_never_in_half_precision_and_give_the_teacher_no_gradient(name, dtype):
    for shape in [(5,), (3, 5), (2, 3, 5), (0, 5)]:
        student, teacher = (random_logits(*shape, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2))
        value = getattr(common, name)(*(student, teacher)[: 1 if name == "entropy" else 2])
        assert value.shape == shape[:-1] and value.dtype == torch.promote_types(dtype, torch.float32)
        grad, none = torch.autograd.grad(value.sum(), (student, teacher), allow_unused=True)
        assert grad.shape == shape and grad.dtype == dtype and none is None


def test_merged_ends_give_the_kl_of_the_merged_distributions_which_is_never_above_the_fine_one():
    student, teacher = random_logits(50, 6, seed=1), random_logits(50, 6, seed=2)
    merged, p = merge_ends(student, (1, 4)), student.softmax(-1)
    assert_same(merged.softmax(-1), torch.stack([p[:, 0], p[:, 2], p[:, 3], p[:, 5], p[:, 1] + p[:, 4]], -1))
    assert torch.autograd.gradcheck(lambda z: merge_ends(z, (1, 4)), student[:3].clone().requires_grad_())
    saved = mixed_kl(student, teacher, 0.3) - mixed_kl(merged, merge_ends(teacher, (1, 4)), 0.3)
    assert (saved >= 0).all() and saved.max() > 0.1  # data processing


def test_draw_takes_the_first_token_whose_cumulative_probability_exceeds_u(monkeypatch):
    """A token of probability 0 is never drawn, the others in proportion to any sum. Quarters are exact in binary: u can
    stand on the steps. Rare tokens of a real vocabulary, which fp32 would not resolve in a CDF, are told apart."""

    def draw_at(probs, u):
        numbers = torch.tensor(u, dtype=torch.float64)[:, None]
        monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **_: numbers.to(dtype).expand(shape))
        return draw(probs.expand(len(u), -1))[:, 0].tolist()

    probs, below_one = torch.tensor([0.0, 0.25, 0.0, 0.0, 0.5, 0.25, 0.0]), 1 - 2.0**-53
    u = (0.0, 0.25 * below_one, 0.25, 0.75 * below_one, 0.75, below_one)
    assert all(draw_at(total * probs, u) == [1, 1, 4, 4, 5, 5] for total in (0.25, 1.0, 8.0))
    probs = torch.tensor([0.999] + [1e-3 / 151_935] * 151_935)
    cdf, tokens = probs.double().cumsum(-1), torch.arange(1, 151_936, 10_007)
    assert draw_at(probs, ((cdf[tokens - 1] + cdf[tokens]) / 2 / cdf[-1]).tolist()) == tokens.tolist()


def test_numbers_are_torchs_own_or_a_generators_and_seeds_depend_on_every_word_and_the_rank(monkeypatch):
    probs = torch.full((40, 2, 1000), 1e-3)
    torch.manual_seed(3)
    own = draw(probs, torch.Generator().manual_seed(3))
    assert torch.equal(draw(probs), own), "a generator of one's own leaves torch's alone"
    assert own.shape == (40, 2, 1) and len(own.unique()) > 60
    words = [(0, "rollouts", 1), (1, "rollouts", 1), (0, "rollouts", 2), (0, "loss", 1), (0, "rollouts", 11)]
    seeds = {seed_of(*w) for w in words + words}
    monkeypatch.setattr(common, "rank_and_world", lambda: (1, 2))
    assert len(seeds | {seed_of(*w) for w in words}) == 10 and max(seeds) >= 2**60


def test_pass_at_k_is_the_share_of_all_k_subsets_that_contain_a_right_answer():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            hits = [any(some) for some in itertools.combinations([True] * c + [False] * (n - c), k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(hits) / len(hits), abs=1e-12)
    for n, c, k in [(4, 2, 5), (0, 0, 1), (4, 5, 2), (4, -1, 2), (4, 2, 0), (4, 2, -1)]:
        with pytest.raises(ValueError):
            pass_at_k(n, c, k)
