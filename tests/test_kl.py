"""The KL math of common.py against references that share no trick with it.

The reference is the definition, Σ p ln(p/q) with p = e^z / Σ e^z, in 60 decimal digits: no log-softmax, no shift by the
maximum, because e^10000 is an ordinary number there. Its gradient is a central difference, which is as good as exact
at that precision, so that no gradient formula is shared either.
"""

import itertools
import math
from decimal import Context, Decimal, localcontext

import pytest
import torch

from common import as_one_end, draw, entropy, forward_kl, kl_by_definition, mixed_kl, pass_at_k, reverse_kl

INF = math.inf
LAMBDAS = [0.0, 0.5, 1.0]
ALMOST_ONE = {dtype: 1 - torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.float64)}  # next below 1
# What each precision can promise: (rtol, atol). The gradient comes back in the input's precision, hence bf16's.
TOLERANCE = {torch.bfloat16: (8e-3, 1e-6), torch.float32: (1e-5, 1e-6), torch.float64: (1e-10, 1e-11)}


def softmax(logits):
    exps = [logit.exp() for logit in logits]
    return [e / sum(exps) for e in exps]


def reference_kl(student, teacher, lam):
    """λ Σ q ln(q/p) + (1−λ) Σ p ln(p/q) of two lists of Decimals, with 0 ln 0 = 0 and x ln(x/0) = ∞."""

    def kl(a, b):
        return sum(x * (x / y).ln() for x, y in zip(a, b) if x > 0)

    q, p = softmax(student), softmax(teacher)
    return sum(weight * kl(a, b) for weight, a, b in [(Decimal(lam), q, p), (1 - Decimal(lam), p, q)] if weight)


def reference(student, teacher, lam):
    """Value (...) and gradient (..., V) of the mixture, from the definition; tensors in, fp64 tensors out."""
    values, grads, step = [], [], Decimal("1e-20")
    with localcontext(Context(prec=60, traps=[])):  # no traps: dividing by zero is the infinity that we want
        for z, w in zip(student.double().flatten(0, -2).tolist(), teacher.double().flatten(0, -2).tolist()):
            z, w = [Decimal(x) for x in z], [Decimal(x) for x in w]

            def shifted(i, by):
                return reference_kl(z[:i] + [z[i] + by] + z[i + 1 :], w, lam)

            values.append(float(reference_kl(z, w, lam)))
            grads.append([float((shifted(i, step) - shifted(i, -step)) / (2 * step)) for i in range(len(z))])
    values, grads = (torch.tensor(result, dtype=torch.float64) for result in (values, grads))
    return values.view(student.shape[:-1]), grads.view(student.shape)


def value_and_grad(kl, student, *args, **kwargs):
    student = student.detach().clone().requires_grad_()
    value = kl(student, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


def random_logits(*shape, scale=2.0, seed=0, dtype=torch.float64):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


# ----------------------------------------------------------------------------------------------------------------
# Values and gradients


@pytest.mark.parametrize(
    "kl, value, slope", [(forward_kl, 0.226289, 0.3), (reverse_kl, 0.311239, 0.430022)], ids=["forward", "reverse"]
)
def test_teacher_90_10_student_60_40(kl, value, slope):
    """Small enough for a pocket calculator: .9 ln(.9/.6) + .1 ln(.1/.4), and the same with the two exchanged."""
    student, teacher = (torch.tensor(probs, dtype=torch.float64).log() for probs in ([0.6, 0.4], [0.9, 0.1]))
    got, grad = value_and_grad(kl, student, teacher)
    assert got.item() == pytest.approx(value, abs=1e-6)
    assert grad.tolist() == pytest.approx([-slope, slope], abs=1e-6)


def test_both_are_the_kl_that_one_writes_first_and_its_gradient_by_autograd():
    """KL(a‖b) = Σ_y a(y) (log a(y) − log b(y)); forward KL is KL(teacher‖student), reverse KL is KL(student‖teacher)."""
    student, teacher = random_logits(4, 6, seed=1), random_logits(4, 6, seed=2)
    forward = value_and_grad(lambda s: kl_by_definition(teacher, s), student)
    reverse = value_and_grad(lambda s: kl_by_definition(s, teacher), student)
    for kl, expected in ((forward_kl, forward), (reverse_kl, reverse)):
        for got, want in zip(value_and_grad(kl, student, teacher), expected):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert (forward[0] - reverse[0]).abs().max() > 0.01


@pytest.mark.parametrize("lam", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_random_logits_match_the_definition(dtype, scale, lam):
    student, teacher = (random_logits(2, 3, 5, scale=scale, seed=seed, dtype=dtype) for seed in (1, 2))
    value, grad = value_and_grad(mixed_kl, student, teacher, lam)
    want_value, want_grad = reference(student, teacher, lam)
    magnitude = max(1.0, scale)  # absolute rounding errors grow with the logits
    rtol, atol = TOLERANCE[torch.promote_types(dtype, torch.float32)]  # the value is never in half precision
    torch.testing.assert_close(value.double(), want_value, rtol=rtol, atol=atol * magnitude)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(grad.double(), want_grad, rtol=rtol, atol=atol * magnitude)


HOSTILE = {  # student's logits, teacher's logits; every KL here is finite in both directions
    "same peak": ([1e4, 0.0, -1e4], [1e4, -1e4, 0.0]),
    "opposite peaks": ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]),
    "far apart, but equal": ([1e4, 1e4, 1e4], [-1e4, -1e4, -1e4]),
    "impossible to both": ([-INF, 1.0, 2.0], [-INF, 3.0, 0.0]),
    "impossible to both, opposite peaks": ([1e4, -INF, -1e4], [-1e4, -INF, 1e4]),
    "one token possible": ([-INF, 0.5, -INF], [-INF, -0.5, -INF]),
}


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_logits_give_finite_and_right_values_and_gradients(case, dtype, lam):
    student, teacher = (torch.tensor([logits], dtype=dtype) for logits in HOSTILE[case])
    value, grad = value_and_grad(mixed_kl, student, teacher, lam)
    want_value, want_grad = reference(student, teacher, lam)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(value.double(), want_value, rtol=rtol, atol=atol)  # a NaN is not close to anything
    torch.testing.assert_close(grad.double(), want_grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("u", [0.0, 0.5, ALMOST_ONE[torch.float32]])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_logits_keep_the_sampled_estimator_finite(case, u, lam):
    student, teacher = (torch.tensor([logits]) for logits in HOSTILE[case])
    for result in value_and_grad(mixed_kl, student, teacher, lam, u=torch.tensor([u])):
        assert result.isfinite().all()


@pytest.mark.parametrize("kl, impossible_to", [(forward_kl, "teacher"), (reverse_kl, "student")])
def test_a_token_impossible_to_one_side_costs_nothing_in_one_direction_and_everything_in_the_other(kl, impossible_to):
    """0 ln(0/q) = 0, but p ln(p/0) = ∞: λ = 0 and 1 must not touch the other direction's infinity (0 · ∞ is NaN)."""
    mute, open_ = torch.tensor([-INF, 1.0, 2.0]), torch.tensor([1.0, 0.0, 3.0])
    student, teacher = (open_, mute) if impossible_to == "teacher" else (mute, open_)
    value, grad = value_and_grad(kl, student, teacher)
    assert torch.tensor([value, *grad]).isfinite().all()
    want_value, want_grad = reference(student[None], teacher[None], lam=float(kl is reverse_kl))
    torch.testing.assert_close(value.double(), want_value[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), want_grad[0], rtol=1e-5, atol=1e-6)
    other = reverse_kl if kl is forward_kl else forward_kl
    assert other(student, teacher) == INF and mixed_kl(student, teacher, 0.5) == INF


@pytest.mark.parametrize("lam", LAMBDAS)
def test_half_precision_logits_over_a_real_vocabulary_match_fp64(lam):
    """A true KL near .001 over 151,936 tokens is what late training looks like, and where bf16 arithmetic is useless.

    The logits are rounded to bf16 first, for the reference too: it is the arithmetic that is tested, not the input.
    """
    teacher = random_logits(3, 151_936, seed=1)
    student = (teacher + random_logits(3, 151_936, scale=0.05, seed=2)).bfloat16()
    teacher = teacher.bfloat16()

    def definition(student):  # moderate logits: in fp64 the plain definition and plain autograd will do
        q, p = (z.exp() / z.exp().sum(-1, keepdim=True) for z in (student, teacher.double()))
        return lam * (q * (q / p).log()).sum(-1) + (1 - lam) * (p * (p / q).log()).sum(-1)

    want_value, want_grad = value_and_grad(definition, student.double())
    assert (5e-4 < want_value).all() and (want_value < 3e-3).all()
    value, grad = value_and_grad(mixed_kl, student, teacher, lam)
    torch.testing.assert_close(value.double(), want_value, rtol=0, atol=1e-5)
    assert (grad.double() - want_grad).norm() < 0.004 * want_grad.norm()  # bf16 keeps 8 bits: half a unit is .2-.4 %


@pytest.mark.parametrize("u", [None, 0.35], ids=["exact", "sampled"])
@pytest.mark.parametrize("lam", [0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
def test_the_mixture_is_affine_in_lambda_and_meets_both_ends(lam, u):
    """L(λ) = λ KL(q‖p) + (1−λ) KL(p‖q). The generalised JSD would go to 0 at both ends instead."""
    student, teacher = random_logits(4, 6, seed=1), random_logits(4, 6, seed=2)
    u = None if u is None else torch.full((4,), u).double()
    mixed = value_and_grad(mixed_kl, student, teacher, lam, u=u)
    forward, reverse = (value_and_grad(kl, student, teacher, u=u) for kl in (forward_kl, reverse_kl))
    for got, at_0, at_1 in zip(mixed, forward, reverse):
        torch.testing.assert_close(got, at_0 + lam * (at_1 - at_0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_student_equal_to_teacher_gives_zero_value_and_gradient(dtype, lam):
    """Cross-entropy passes every gradient test but this value: it lacks the teacher's entropy."""
    logits = random_logits(4, 50, scale=5.0, dtype=dtype)
    for result in value_and_grad(mixed_kl, logits, logits.clone(), lam):
        assert result.abs().max() < 1e-6


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_gradients_match_finite_differences_at_every_shape(lam):
    """One-hot upstream gradients, too: the caller's weights (mask, normalisation) must reach every prefix."""
    for shape in [(5,), (3, 5), (2, 3, 5)]:
        student, teacher = random_logits(*shape, seed=1).requires_grad_(), random_logits(*shape, seed=2)
        assert torch.autograd.gradcheck(lambda z: mixed_kl(z, teacher, lam), (student,))


@pytest.mark.parametrize("u", [None, 0.5], ids=["exact", "sampled"])
@pytest.mark.parametrize("lam", LAMBDAS)
def test_the_teacher_gets_no_gradient(lam, u):
    student, teacher = random_logits(3, 5, seed=1).requires_grad_(), random_logits(3, 5, seed=2).requires_grad_()
    mixed_kl(student, teacher, lam, u=None if u is None else torch.full((3,), u)).sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_results_are_unreduced_and_never_in_half_precision(dtype, shape):
    student, teacher = random_logits(*shape, seed=1, dtype=dtype), random_logits(*shape, seed=2, dtype=dtype)
    for u in (None, torch.rand(shape[:-1])):
        for kl in (forward_kl, reverse_kl):
            value, grad = value_and_grad(kl, student, teacher, u=u)
            assert value.shape == shape[:-1] and value.dtype == torch.promote_types(dtype, torch.float32)
            assert grad.shape == shape and grad.dtype == dtype
    assert entropy(student).shape == shape[:-1] and entropy(student).dtype == value.dtype


# ----------------------------------------------------------------------------------------------------------------
# All end tokens as one action


ENDS = (1, 4)


def merged(logits):
    """The definition, by probabilities: tokens 0, 2, 3, 5 as they are, then the sum of both ends."""
    p = logits.softmax(-1)
    return torch.cat([p[..., [0, 2, 3, 5]], p[..., list(ENDS)].sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_ends_as_one_is_the_kl_of_the_merged_distributions_and_never_above_the_fine_one(lam):
    student, teacher = random_logits(50, 6, seed=1).requires_grad_(), random_logits(50, 6, seed=2)
    coarse = mixed_kl(as_one_end(student, ENDS), as_one_end(teacher, ENDS), lam)
    p, q = merged(teacher), merged(student)
    definition = lam * (q * (q / p).log()).sum(-1) + (1 - lam) * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(coarse, definition, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(kl.sum(), student, retain_graph=True)[0] for kl in (coarse, definition)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    fine = mixed_kl(student, teacher, lam)
    assert (coarse <= fine + 1e-12).all() and (coarse < fine - 0.01).any()  # data processing


@pytest.mark.parametrize("lam", LAMBDAS)
def test_ends_as_one_costs_nothing_where_both_split_the_end_alike(lam):
    student, teacher = random_logits(50, 6, seed=1), random_logits(50, 6, seed=2)
    for logits in (student, teacher):
        logits[:, 1] = logits[:, 4] + 0.7
    coarse = mixed_kl(as_one_end(student, ENDS), as_one_end(teacher, ENDS), lam)
    torch.testing.assert_close(coarse, mixed_kl(student, teacher, lam), rtol=0, atol=1e-12)


def test_a_student_that_ends_in_its_own_way_is_only_punished_where_ends_are_told_apart():
    """Both want to end here, with .98, and each has a token of its own for it. Apart, reverse KL takes probability from
    the student's own end and gives the teacher's nothing to speak of; as one, there is nothing to learn."""
    student = torch.tensor([[0.01, 0.98, 0.01 / 3, 0.01 / 3, 1e-8, 0.01 / 3]], dtype=torch.float64).log()
    teacher = student[:, [0, 4, 2, 3, 1, 5]]
    value, grad = value_and_grad(reverse_kl, student, teacher)
    assert value > 10 and grad[0, 1] > 0.1 and abs(grad[0, 4]) < 1e-6
    value, grad = value_and_grad(lambda s: reverse_kl(as_one_end(s, ENDS), as_one_end(teacher, ENDS)), student)
    assert value < 1e-12 and grad.abs().max() < 1e-9


# ----------------------------------------------------------------------------------------------------------------
# Entropy


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_entropy_matches_the_definition(dtype):
    logits = random_logits(4, 6, dtype=dtype)
    with localcontext(Context(prec=60)):
        rows = [softmax([Decimal(z) for z in row]) for row in logits.tolist()]
        want = torch.tensor([float(-sum(q * q.ln() for q in row)) for row in rows], dtype=torch.float64)
    rtol, atol = TOLERANCE[torch.promote_types(dtype, torch.float32)]
    torch.testing.assert_close(entropy(logits).double(), want, rtol=rtol, atol=atol)


def test_entropy_is_ln_v_when_uniform_and_zero_when_certain():
    for vocabulary in (2, 7, 151_936):
        assert entropy(torch.zeros(vocabulary)).item() == pytest.approx(math.log(vocabulary), rel=1e-5)
    certain = torch.tensor([[1e4, -1e4, 0.0], [0.0, -INF, -INF]])
    assert entropy(certain).tolist() == [0.0, 0.0]
    half = torch.tensor([0.0, 0.0, -INF])  # 0 log 0 = 0
    assert entropy(half).item() == pytest.approx(math.log(2))


# ----------------------------------------------------------------------------------------------------------------
# Drawing a token from one uniform number


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_draw_takes_the_first_token_whose_cumulative_probability_exceeds_u(dtype):
    """Quarters and halves are exact in binary, so that u can stand exactly on the steps of the CDF."""
    probs = torch.tensor([0.0, 0.25, 0.0, 0.0, 0.5, 0.25, 0.0], dtype=dtype)
    just_below = ALMOST_ONE[dtype]
    cases = [(0.0, 1), (0.25 * just_below, 1), (0.25, 4), (0.75 * just_below, 4), (0.75, 5), (just_below, 5)]
    for u, token in cases:
        assert draw(probs, torch.tensor(u, dtype=dtype)) == token
    u = torch.tensor([u for u, _ in cases], dtype=dtype)
    assert draw(probs.expand(3, 6, 7), u.expand(3, 6)).tolist() == [[token for _, token in cases]] * 3


def test_draw_tells_the_rare_tokens_of_a_real_vocabulary_apart():
    """Each of them adds less to a CDF than fp32 resolves there. The tokens are those between whose sums u lies."""
    probs = torch.full((151_936,), 1e-3 / 151_935)
    probs[0] = 0.999
    cdf, y = probs.double().cumsum(-1), torch.arange(1, 151_936, 10_007)
    u = (cdf[y - 1] + cdf[y]) / 2 / cdf[-1]
    assert torch.equal(draw(probs.expand(len(y), -1), u), y)


@pytest.mark.parametrize("total", [0.25, 1.0, 8.0])
def test_draw_needs_no_normalised_probabilities(total):
    """Cutting a distribution off (top-k, top-p) leaves less than 1; what is left is drawn in proportion."""
    probs = torch.tensor([0.25, 0.0, 0.5, 0.25])
    assert draw(total * probs, torch.tensor([0.0, 0.24, 0.25, 0.74, 0.75, 0.99])).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_draw_never_takes_an_impossible_token(dtype):
    """Rounding lets a CDF over a real vocabulary end off 1; its two ends must still be tokens that can occur."""
    for seed in range(3):
        logits = random_logits(151_936, seed=seed, dtype=dtype)
        logits[:1000] = logits[-1000:] = logits[5000::2] = -INF
        probs = logits.softmax(-1)
        u = torch.cat([torch.linspace(0, 1, 20_001, dtype=dtype)[:-1], torch.tensor([ALMOST_ONE[dtype]], dtype=dtype)])
        tokens = draw(probs, u)
        assert (probs[tokens] > 0).all()
        assert tokens[0] == 1000  # u = 0: the first token that can occur
        # A uniform number in more digits than the probabilities have may round up to 1. It is drawn from all the same.
        assert probs[draw(probs, torch.tensor(ALMOST_ONE[torch.float64], dtype=torch.float64))] > 0


# ----------------------------------------------------------------------------------------------------------------
# Pass@k


@pytest.mark.parametrize(
    "n, c, k, value", [(8, 1, 1, 0.125), (8, 3, 4, 0.928571), (16, 2, 8, 0.766667), (4, 0, 4, 0.0), (4, 1, 4, 1.0)]
)
def test_pass_at_k_known_values(n, c, k, value):
    assert pass_at_k(n, c, k) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("n, c, k", [(4, 2, 5), (0, 0, 1), (4, 5, 2), (4, -1, 2), (4, 2, 0), (4, 2, -1)])
def test_pass_at_k_refuses_what_it_cannot_estimate(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_pass_at_k_is_the_share_of_all_k_subsets_that_contain_a_right_answer():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased():
    """Over all 2^n outcomes of n samples, each right with probability a: E[pass_at_k] = 1 − (1 − a)^k, at any n ≥ k.

    The tempting 1 − (1 − c/n)^k is biased downwards.
    """
    n, k, a = 6, 3, 0.2
    mean = naive = 0.0
    for outcome in itertools.product([0, 1], repeat=n):
        c = sum(outcome)
        weight = a**c * (1 - a) ** (n - c)
        mean += weight * pass_at_k(n, c, k)
        naive += weight * (1 - (1 - c / n) ** k)
    assert mean == pytest.approx(1 - (1 - a) ** k, abs=1e-12)
    assert naive < mean - 0.05
