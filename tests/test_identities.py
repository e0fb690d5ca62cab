"""The identities that the four objectives stand on, checked in numbers. Read from top to bottom, it is a lesson.

p is the frozen teacher, q the student, s a prefix, ∇ the gradient in the student's parameters, sg[·] stops gradients
(`.detach()`). Expectations are sums over everything that could be drawn, so that equalities hold to rounding; only
part 5, which is about sampling, is statistical. All in fp64.

It begins with what can be checked by hand. Up to part 6 a model is a table with one row of logits for each prefix.
Nothing is lost: any network is a function from its parameters to such a table, and the chain rule carries every
gradient identity over; part 7 shows it for Proposition 1, in the parameters of a transformer.
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from common import (
    draw,
    entropy,
    forward_kl,
    mixed_kl,
    reverse_kl,
    sampled_forward_kl,
    sampled_mixed_kl,
    sampled_reverse_kl,
)


def grad(loss, wrt):
    return torch.autograd.grad(loss, wrt, retain_graph=True)[0]


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def assert_differ(a, b):
    """Without this, an identity could hold because both of its sides are zero."""
    assert (a - b).abs().max() > 0.01


def logits_pair(*shape):
    """-> student's logits (a leaf), teacher's logits; (..., V) each."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


# ----------------------------------------------------------------------------------------------------------------
# 1. Four objectives, four optima


@pytest.mark.parametrize("prefixes, kl, optimum", [
    ("teacher", forward_kl, 0.438),
    ("teacher", reverse_kl, 0.560),
    ("student", forward_kl, 0.783),
    ("student", reverse_kl, 0.951),
], ids=["sft_offpolicy", "offline_rl_distill", "dagger_onpolicy", "opd"])  # fmt: skip
def test_four_corners_have_four_optima(prefixes, kl, optimum):
    """A student that can copy its teacher has one optimum for all four. One that cannot must choose, and here it does:
    it does not see the context, A or B, and the teacher says token 0 with .99 after A and with .3 after B.

    Forward KL settles at the mean of the teacher's probabilities, reverse KL at that of its logits; which context
    counts how much is up to the prefixes.
    """
    teacher = torch.tensor([[0.99, 0.01], [0.3, 0.7]], dtype=torch.float64).log()  # (contexts, V)
    weights = torch.tensor({"teacher": [0.2, 0.8], "student": [0.7, 0.3]}[prefixes], dtype=torch.float64)
    student = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # (V,): the same logits after A and after B
    for _ in range(1000):
        loss = (weights * kl(student.expand(2, 2), teacher)).sum()
        student.data -= grad(loss, student)  # plain gradient descent, learning rate 1
    assert student.softmax(-1)[0].item() == pytest.approx(optimum, abs=5e-4)


# ----------------------------------------------------------------------------------------------------------------
# 2. From sequences to tokens: a world small enough to write down every response


V, L, END = 3, 3, 2  # tokens 0 and 1, an end token, and at most 3 tokens
PREFIXES = [s for t in range(L) for s in product((0, 1), repeat=t)]  # S = 7, from () to (1, 1)
RESPONSES = [s + (y,) for s in PREFIXES for y in range(V) if y == END or len(s) == L - 1]  # ended, or cut at L: 15


def tables():
    """-> student's logits (S, V), a leaf, and teacher's logits (S, V)."""
    return logits_pair(len(PREFIXES), V)


def token_log_probs(logits, response):
    """(S, V) -> (T,): log q(y_t | s_t), s_t = y_<t, for every token of the response."""
    rows = [PREFIXES.index(response[:t]) for t in range(len(response))]
    return logits.log_softmax(-1)[rows, list(response)]


def response_log_probs(logits):
    """(S, V) -> (15,): log q(y) = Σ_t log q(y_t | s_t)"""
    return torch.stack([token_log_probs(logits, response).sum() for response in RESPONSES])


def visits(logits):
    """(S, V) -> (S,): how probable it is that a response passes through each prefix, d(s).

    Without gradient: a prefix that has been sampled is data.
    """
    probs = response_log_probs(logits).exp().detach()
    through = [[response[: len(s)] == s for response in RESPONSES] for s in PREFIXES]  # (S, 15)
    return torch.tensor(through, dtype=torch.float64) @ probs


def sequence_kl(a, b):
    """KL(a‖b) = Σ_y a(y) (log a(y) − log b(y)) over whole responses."""
    log_a, log_b = response_log_probs(a), response_log_probs(b)
    return (log_a.exp() * (log_a - log_b)).sum()


def test_every_response_is_counted_once():
    student, _ = tables()
    assert_same(response_log_probs(student).exp().sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_sequence_kl_is_the_sum_of_token_kls_over_the_prefixes_that_its_first_argument_induces(direction):
    """KL(p‖q) = Σ_s d^T(s) KL(p(·|s)‖q(·|s)): forward KL drags the teacher's prefixes along.
    KL(q‖p) = Σ_s d^S(s) KL(q(·|s)‖p(·|s)): reverse KL drags the student's.

    With the other's prefixes the sum is a perfectly good objective, but no longer the KL of the sequences.
    """
    student, teacher = tables()
    if direction == "forward":
        whole, token_kls = sequence_kl(teacher, student), forward_kl(student, teacher)
        own, other = visits(teacher), visits(student)
    else:
        whole, token_kls = sequence_kl(student, teacher), reverse_kl(student, teacher)
        own, other = visits(student), visits(teacher)
    assert_same(whole, (own * token_kls).sum())
    assert_differ(whole, (other * token_kls).sum())


# ----------------------------------------------------------------------------------------------------------------
# 3. What training token by token leaves out


def test_sequence_reverse_kl_gradient_is_the_token_one_plus_a_reward_to_go_that_opd_leaves_out():
    """∇ KL(q‖p) = Σ_s d^S(s) ∇ KL(q(·|s)‖p(·|s)) + E_{y~q}[ Σ_t ∇ log q(y_t|s_t) Σ_{t'>t} (log q − log p)(y_t'|s_t') ]

    The first term is OPD: the student's prefixes, taken as data. The second rewards an action for the states that it
    leads to.
    """
    student, teacher = tables()
    opd = grad((visits(student) * reverse_kl(student, teacher)).sum(), student)

    reward_to_go = 0
    for response, prob in zip(RESPONSES, response_log_probs(student).exp().detach()):
        log_q, log_p = token_log_probs(student, response), token_log_probs(teacher, response)
        log_ratio = (log_q - log_p).detach()
        for t in range(len(response)):
            reward_to_go = reward_to_go + prob * log_q[t] * log_ratio[t + 1 :].sum()
    left_out = grad(reward_to_go, student)

    whole = grad(sequence_kl(student, teacher), student)
    assert_same(whole, opd + left_out)
    assert_differ(whole, opd)
    assert_same(left_out[-4:], torch.zeros_like(left_out[-4:]))  # the last token leads nowhere


def test_sequence_forward_kl_gradient_is_the_token_one_with_nothing_left_out():
    """∇ KL(p‖q) = Σ_s d^T(s) ∇ KL(p(·|s)‖q(·|s)): the teacher's prefixes do not depend on the student at all."""
    student, teacher = tables()
    whole = grad(sequence_kl(teacher, student), student)
    assert_same(whole, grad((visits(teacher) * forward_kl(student, teacher)).sum(), student))


# ----------------------------------------------------------------------------------------------------------------
# 4. The two objectives off the diagonal have names of their own


def test_student_prefix_forward_kl_is_dagger():
    """DAgger: visit the states that the student visits, label them with the teacher's actions, fit by cross-entropy.

    Σ_s d^S(s) ∇ KL(p(·|s)‖q(·|s)) = Σ_s d^S(s) E_{y~p(·|s)}[ ∇ (−log q(y|s)) ]
    """
    student, teacher = tables()
    objective = (visits(student) * forward_kl(student, teacher)).sum()

    dagger = 0
    for label in range(V):  # every label that the teacher could give, at every state
        cross_entropy = F.cross_entropy(student, torch.full((len(PREFIXES),), label), reduction="none")  # (S,)
        dagger = dagger + (visits(student) * teacher.softmax(-1)[:, label] * cross_entropy).sum()

    assert_same(grad(objective, student), grad(dagger, student))
    # The values differ by the teacher's entropy where the student goes. It is a number to the gradient, but no
    # constant of training: it moves with the student's states.
    assert_same(dagger - objective, (visits(student) * entropy(teacher)).sum())
    sft = (visits(teacher) * forward_kl(student, teacher)).sum()  # behaviour cloning: the same labels, other states
    assert_differ(grad(objective, student), grad(sft, student))


def test_teacher_prefix_reverse_kl_is_a_policy_gradient_with_student_actions_at_teacher_states():
    """Σ_s d^T(s) ∇ KL(q(·|s)‖p(·|s)) = − Σ_s d^T(s) E_{y~q(·|s)}[ r(s, y) ∇ log q(y|s) ],  r = log p − log q"""
    student, teacher = tables()
    objective = (visits(teacher) * reverse_kl(student, teacher)).sum()

    policy_loss = 0
    for action in range(V):  # every action that the student could take, at every state
        log_q, log_p = student.log_softmax(-1)[:, action], teacher.log_softmax(-1)[:, action]  # (S,)
        policy_loss = policy_loss - (visits(teacher) * (log_q.exp() * (log_p - log_q)).detach() * log_q).sum()

    assert_same(grad(objective, student), grad(policy_loss, student))
    opd = (visits(student) * reverse_kl(student, teacher)).sum()
    assert_differ(grad(objective, student), grad(opd, student))


def test_reweighting_the_teachers_own_actions_gives_offline_rl_and_reweighting_its_states_too_gives_opd():
    """From the teacher's responses alone, y ~ p, with the importance weight ρ_t = q(y_t|s_t) / p(y_t|s_t):

    Σ_s d^T(s) ∇ KL(q(·|s)‖p(·|s)) = − E_{y~p}[ Σ_t ρ_t r_t ∇ log q(y_t|s_t) ]
    Only the action is reweighted, the states stay the teacher's: this is offline RL. With ρ_1 ρ_2 ⋯ ρ_t for ρ_t the
    states become the student's, and the same data give the gradient of OPD, at the price of a product that explodes.
    """
    student, teacher = tables()
    offline = opd = 0
    for response, prob in zip(RESPONSES, response_log_probs(teacher).exp()):
        log_q, log_p = token_log_probs(student, response), token_log_probs(teacher, response)  # (T,)
        reward = (log_p - log_q).detach()
        weight = (log_q - log_p).exp().detach()
        offline = offline - prob * (weight * reward * log_q).sum()
        opd = opd - prob * (weight.cumprod(0) * reward * log_q).sum()

    token_kls = reverse_kl(student, teacher)
    assert_same(grad(offline, student), grad((visits(teacher) * token_kls).sum(), student))
    assert_same(grad(opd, student), grad((visits(student) * token_kls).sum(), student))


# ----------------------------------------------------------------------------------------------------------------
# 5. The sampled estimators


STANDARD_ERRORS = 4  # by chance alone 1 number in 16,000 is outside; the seeds are fixed, so that none ever is here


def assert_unbiased(samples, exact):
    """samples (N, ...) have the mean `exact` (...) within 4 standard errors, and enough of them to mean something."""
    standard_error = samples.std(0) / len(samples) ** 0.5
    assert standard_error.max() < 0.01
    assert ((samples.mean(0) - exact).abs() < STANDARD_ERRORS * standard_error).all()


def one_sample_each(n, vocabulary=5):
    """-> student (V,) leaf, teacher (V,), the same n times over (n, V) with a leaf of its own. Sets the seed to 1."""
    student, teacher = logits_pair(vocabulary)
    torch.manual_seed(1)
    return student, teacher, student.detach().repeat(n, 1).requires_grad_(), teacher.expand(n, vocabulary)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_one_sampled_token_gives_an_unbiased_value_and_gradient(lam):
    student, teacher, students, teachers = one_sample_each(100_000)
    exact = mixed_kl(student, teacher, lam)
    sampled = sampled_mixed_kl(students, teachers, lam)  # (n,)
    assert_unbiased(sampled.detach(), exact.detach())
    assert_unbiased(grad(sampled.sum(), students), grad(exact, student))
    # And that is a test: the gradients of the two directions are a hundred standard errors apart.
    apart = grad(forward_kl(student, teacher), student) - grad(reverse_kl(student, teacher), student)
    assert apart.abs().max() > 0.2


def test_hard_label_sft_is_the_monte_carlo_form_of_forward_kl():
    """y ~ p: the cross-entropy −log q(y) has the gradient of the sampled forward KL, token by token, and in expectation
    that of KL(p‖q). As a number it is larger by the teacher's entropy, which no student can remove.
    """
    student, teacher, students, teachers = one_sample_each(100_000)
    labels = draw(teachers.softmax(-1))[:, 0]
    sft = F.cross_entropy(students, labels, reduction="none")
    exact = forward_kl(student, teacher)
    torch.manual_seed(1)  # so that the same tokens are drawn again
    assert_same(grad(sampled_forward_kl(students, teachers).sum(), students), grad(sft.sum(), students))
    assert_unbiased(grad(sft.sum(), students), grad(exact, student))
    assert_unbiased(sft.detach(), (exact + entropy(teacher)).detach())


def test_sampled_reverse_kl_is_reinforce_with_the_log_ratio_as_reward():
    """y ~ q: −sg[r] log q(y), r = log p(y) − log q(y), has the gradient of the sampled reverse KL, token by token."""
    _, _, students, teachers = one_sample_each(1_000)
    action = draw(students.softmax(-1).detach())
    log_q, log_p = (logits.log_softmax(-1).gather(-1, action)[:, 0] for logits in (students, teachers))
    reinforce = -(log_p - log_q).detach() * log_q
    torch.manual_seed(1)  # so that the same tokens are drawn again
    assert_same(grad(sampled_reverse_kl(students, teachers).sum(), students), grad(reinforce.sum(), students))


def test_stopping_the_gradient_of_the_reward_matters():
    """Forget the sg[·] on r = log p − log q, and the gradient of −r log q gains E_q[ log q ∇ log q ] = −∇H(q).

    That is, one minimises KL(q‖p) − H(q) = 2 E_q[log q] − E_q[log p], whose optimum is not p but q ∝ √p: the teacher
    at temperature 2.
    """
    student, teacher = logits_pair(5)

    def with_and_without(student):
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        q, reward = log_q.exp().detach(), log_p - log_q  # q: how often a sampler takes the action, hence no gradient
        return grad(-(q * reward.detach() * log_q).sum(), student), grad(-(q * reward * log_q).sum(), student)

    stopped, leaking = with_and_without(student)
    assert_same(stopped, grad(reverse_kl(student, teacher), student))
    assert_same(leaking - stopped, -grad(entropy(student), student))
    assert_differ(leaking, stopped)

    at_teacher = teacher.clone().requires_grad_()
    at_temperature_2 = (teacher / 2).requires_grad_()
    zero = torch.zeros_like(teacher)
    assert_same(with_and_without(at_teacher)[0], zero)
    assert_same(with_and_without(at_temperature_2)[1], zero)
    assert_differ(with_and_without(at_teacher)[1], zero)


# ----------------------------------------------------------------------------------------------------------------
# 6. Schulman's estimators of KL(q‖p) from y ~ q, with ratio p(y)/q(y)


ESTIMATORS = {
    "k1": lambda log_ratio: -log_ratio,
    "k2": lambda log_ratio: log_ratio**2 / 2,
    "k3": lambda log_ratio: log_ratio.exp() - 1 - log_ratio,
}


@pytest.fixture(params=["random", "teacher 90/10, student 60/40"])
def schulman(request):
    """-> a function k -> (value, gradient as loss, gradient as reward), the student, the teacher; all exact."""
    student, teacher = logits_pair(5)
    if request.param != "random":
        student = torch.tensor([0.6, 0.4], dtype=torch.float64).log().requires_grad_()
        teacher = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    q = log_q.exp().detach()  # the tokens come from a sampler

    def use(name):
        k = ESTIMATORS[name](log_p - log_q)
        return (q * k).sum(), grad((q * k).sum(), student), grad((q * k.detach() * log_q).sum(), student)

    return use, student, teacher


def test_k1_and_k3_have_the_value_of_reverse_kl_and_k2_does_not(schulman):
    """E_q[k1] = E_q[k3] = KL(q‖p), as E_q[p/q − 1] = 0. k2 is biased; for q near p it is close. k2, k3 ≥ 0 always."""
    use, student, teacher = schulman
    (k1, *_), (k2, *_), (k3, *_) = (use(name) for name in ESTIMATORS)
    kl = reverse_kl(student, teacher)
    assert_same(k1, kl)
    assert_same(k3, kl)
    assert_differ(k2, kl)
    log_ratio = teacher.log_softmax(-1) - student.log_softmax(-1)
    assert (ESTIMATORS["k1"](log_ratio) < 0).any()
    assert (ESTIMATORS["k2"](log_ratio) >= 0).all() and (ESTIMATORS["k3"](log_ratio) >= 0).all()


@pytest.mark.parametrize("name, as_loss", [("k1", "zero"), ("k2", "reverse"), ("k3", "forward")])
def test_as_a_loss_k1_gives_nothing_k2_the_reverse_and_k3_the_forward_kl_gradient(schulman, name, as_loss):
    """Differentiating k at sampled tokens, without counting how sampling depends on θ:

    E_q[∇k1] = E_q[∇ log q] = 0,  E_q[∇k2] = E_q[(log q − log p) ∇ log q],  E_q[∇k3] = E_q[(1 − p/q) ∇ log q].
    A right value is no promise of a right gradient, nor the other way round.
    """
    use, student, teacher = schulman
    _, got, _ = use(name)
    reverse, forward = (grad(kl(student, teacher), student) for kl in (reverse_kl, forward_kl))
    assert_same(got, {"zero": torch.zeros_like(got), "reverse": reverse, "forward": forward}[as_loss])
    assert_differ(reverse, forward)


def test_as_a_reward_only_k1_gives_the_reverse_kl_gradient(schulman):
    """E_q[ sg[k] ∇ log q ]: k1 gives ∇ KL(q‖p), k3 gives ∇ KL(q‖p) − ∇ KL(p‖q), k2 neither.

    Loss and reward are the two halves of one product rule, ∇ E_q[k] = E_q[∇k] + E_q[k ∇ log q].
    """
    use, student, teacher = schulman
    (_, _, k1), (_, _, k2), (_, _, k3) = (use(name) for name in ESTIMATORS)
    reverse, forward = (grad(kl(student, teacher), student) for kl in (reverse_kl, forward_kl))
    assert_same(k1, reverse)
    assert_same(k3, reverse - forward)
    for other in (reverse, forward, reverse - forward):
        assert_differ(k2, other)

    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    for name, k in ESTIMATORS.items():
        _, as_loss, as_reward = use(name)
        assert_same(as_loss + as_reward, grad((log_q.exp() * k(log_p - log_q)).sum(), student))


# ----------------------------------------------------------------------------------------------------------------
# 7. Proposition 1, in the parameters of a transformer


@pytest.fixture(scope="module")
def transformer():
    """A small Qwen3 student at B = 4 prefixes over V = 7 tokens, and another as its teacher.

    -> student's logits (B, V), teacher's logits (B, V), the student's parameters, and the score (B, V, N): ∇ log q(y|s)
    for every prefix s and token y, with one number for each of the N parameters.
    """

    def make(seed):
        torch.manual_seed(seed)
        sizes = dict(vocab_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=8)
        heads = dict(num_attention_heads=2, num_key_value_heads=1)
        # The usual range, .02, starts near the uniform distribution, where too much is equal.
        config = Qwen3Config(**sizes, **heads, initializer_range=0.3)
        return Qwen3ForCausalLM(config).double()

    prefixes = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 6, 6], [1, 5, 0]])
    student, teacher = make(seed=1), make(seed=2)
    parameters = list(student.parameters())
    logits = student(prefixes).logits[:, -1]
    with torch.no_grad():
        teacher_logits = teacher(prefixes).logits[:, -1]
    log_q = logits.log_softmax(-1)
    score = torch.stack([torch.stack([flat_grad(log_q[b, y], parameters) for y in range(7)]) for b in range(4)])
    return logits, teacher_logits, parameters, score


def flat_grad(loss, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])


def assert_same_up_to_fp32(a, b):
    """RMSNorm and rotary embeddings compute in fp32 even in an fp64 model, backwards too: 1e-6, not 1e-12.

    (For the same reason a finite difference would be no reference here; two gradients by autograd are.)
    """
    assert (a - b).norm() < 1e-6 * b.norm()


def test_proposition_1_i_forward_kl_gradient_is_minus_the_teachers_expectation_of_the_score(transformer):
    """∇ KL(p‖q) = − E_{y~p}[ ∇ log q(y|s) ]"""
    logits, teacher_logits, parameters, score = transformer
    p, q = teacher_logits.softmax(-1), logits.softmax(-1)
    definition = flat_grad((p * (p / q).log()).sum(), parameters)
    expectation = -(p[..., None] * score).sum((0, 1))
    ours = flat_grad(forward_kl(logits, teacher_logits).sum(), parameters)
    assert_same_up_to_fp32(expectation, definition)
    assert_same_up_to_fp32(ours, definition)


def test_proposition_1_ii_reverse_kl_gradient_is_a_policy_gradient_with_the_log_ratio_as_reward(transformer):
    """∇ KL(q‖p) = E_{y~q}[ (log q(y|s) − log p(y|s)) ∇ log q(y|s) ]: the reward log p − log q is only a number."""
    logits, teacher_logits, parameters, score = transformer
    p, q = teacher_logits.softmax(-1), logits.softmax(-1)
    definition = flat_grad((q * (q / p).log()).sum(), parameters)
    expectation = ((q * (q / p).log())[..., None] * score).sum((0, 1)).detach()
    ours = flat_grad(reverse_kl(logits, teacher_logits).sum(), parameters)
    assert_same_up_to_fp32(expectation, definition)
    assert_same_up_to_fp32(ours, definition)
    # The loss that a script would write: actions weighted by how often they are taken, times a reward, all constant.
    surrogate = ((q * (q / p).log()).detach() * logits.log_softmax(-1)).sum()
    assert_same_up_to_fp32(flat_grad(surrogate, parameters), definition)


def test_the_score_has_mean_zero_so_that_a_reward_known_before_the_action_teaches_nothing(transformer):
    """E_{y~q}[ b(s) ∇ log q(y|s) ] = b(s) ∇ Σ_y q(y|s) = 0, for any number b(s).

    So every baseline is free; and the KL of a state, given as advantage to every action there, is only a baseline.
    """
    logits, teacher_logits, _, score = transformer
    state_kl = reverse_kl(logits, teacher_logits).detach()
    gradient = (state_kl[:, None, None] * logits.softmax(-1)[..., None] * score).sum((0, 1))
    assert state_kl.min() > 0.01 and score.norm() > 1
    assert gradient.norm() < 1e-6 * score.norm()
