"""What every script of this repository shares: KL math, sampling, evaluation, and a little plumbing.

Nothing here knows a method. A method is two choices that stand in its own script: whose prefixes
(`sample(student, ...)` or `stored_rollouts(teacher, ...)`) and which divergence (`forward_kl` or `reverse_kl`).

Notation: B sequences, P prompt tokens, R response tokens, T = P + R, H hidden size, V vocabulary size; p_T (p) is
the frozen teacher, q_θ (q) the student. Logits at position t predict token t + 1. KLs and entropies are in nats.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------------------
# KL math


class _KL(torch.autograd.Function):
    """λ·KL(q‖p) + (1−λ)·KL(p‖q) at every prefix. Its backward *is* Proposition 1 of arXiv 2605.16826.

    For a softmax, ∇ log q(y) in logit space is onehot(y) − q. Put that into the two statements of the proposition,

        (i)   ∇ KL(p‖q) = − E_{y~p}[ ∇ log q(y) ]                          =  q − p
        (ii)  ∇ KL(q‖p) =   E_{y~q}[ (log q(y) − log p(y)) ∇ log q(y) ]    =  q · (log q − log p − KL)

    so (i) is cross-entropy on soft targets, and (ii) is a policy gradient whose reward is r = log p − log q and whose
    baseline is its own mean, −KL. With `u` we draw the one token y that the expectation is over instead of summing.
    Both KLs share their four softmaxes here, and the gradient is formed while they are at hand: V-sized tensors are
    what costs time and memory, and autograd would keep several of them.
    """

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, lam, u):
        dtype = torch.promote_types(student_logits.dtype, torch.float32)  # bf16 KLs come out wrong by a factor of two
        log_q = student_logits.to(dtype).log_softmax(-1)
        log_p = teacher_logits.to(dtype).log_softmax(-1)
        q, p = log_q.exp(), log_p.exp()
        log_ratio = log_q - log_p  # −r(s, y); NaN where both are impossible, hence the `where`s: 0·log 0 = 0
        kl, grad = q.new_zeros(q.shape[:-1]), 0.0
        if lam < 1 and u is None:
            kl = kl - (1 - lam) * torch.where(p > 0, p * log_ratio, 0).sum(-1)
            grad = grad + (1 - lam) * (q - p)
        if lam > 0 and u is None:
            reverse = torch.where(q > 0, q * log_ratio, 0).sum(-1)
            kl = kl + lam * reverse
            grad = grad + lam * torch.where(q > 0, q * (log_ratio - reverse[..., None]), 0)
        if lam < 1 and u is not None:
            y = draw(p, u)[..., None]  # a label from the teacher: ordinary SFT on y
            kl = kl - (1 - lam) * log_ratio.gather(-1, y)[..., 0]
            grad = grad + (1 - lam) * q.scatter_add(-1, y, -torch.ones_like(q).gather(-1, y))
        if lam > 0 and u is not None:
            y = draw(q, u)[..., None]  # an action of the student, reinforced by the reward r = −log_ratio
            cost = log_ratio.gather(-1, y)
            kl = kl + lam * cost[..., 0]
            grad = grad + lam * (-q * cost).scatter_add(-1, y, cost)
        ctx.save_for_backward(grad)
        ctx.dtype = student_logits.dtype
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        return (grad_output[..., None] * grad).to(ctx.dtype), None, None, None


def forward_kl(student_logits, teacher_logits, u=None):
    """KL(p_T‖q_θ) = Σ_y p_T(y) (log p_T(y) − log q_θ(y)): mass-covering, soft-target cross-entropy, SFT.

    (..., V), (..., V) -> (...), nats, unreduced. Computed in fp32 where the input is half precision, in the input's
    own precision otherwise. Differentiable in the student's logits only. Finite wherever the limit is.
    u (...) uniform in [0, 1): estimate it from the one token y ~ p_T that u picks, log p_T(y) − log q_θ(y); the
    gradient, −∇ log q_θ(y), is unbiased for the exact one: Proposition 1 (i).
    """
    return _KL.apply(student_logits, teacher_logits, 0.0, u)


def reverse_kl(student_logits, teacher_logits, u=None):
    """KL(q_θ‖p_T) = Σ_y q_θ(y) (log q_θ(y) − log p_T(y)): mode-seeking, a policy gradient with a dense reward.

    Shapes, units and precision as in forward_kl. u (...): estimate it from the one token y ~ q_θ that u picks; the
    gradient, (log q_θ(y) − log p_T(y)) ∇ log q_θ(y) with the bracket held constant, is Proposition 1 (ii).
    """
    return _KL.apply(student_logits, teacher_logits, 1.0, u)


def mixed_kl(student_logits, teacher_logits, lam, u=None):
    """λ·KL(q_θ‖p_T) + (1−λ)·KL(p_T‖q_θ), λ = lam in [0, 1]: 0 is forward_kl, 1 is reverse_kl, linear in between.

    Not the generalised JSD of GKD, which compares both with a mixture *distribution* and goes to 0 at its ends.
    Shapes, units, precision and u as in forward_kl.
    """
    return _KL.apply(student_logits, teacher_logits, float(lam), u)


def entropy(logits):
    """H(softmax(logits)) = −Σ_y q(y) log q(y). (..., V) -> (...), nats, in fp32 where the input is half precision."""
    log_q = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    q = log_q.exp()
    return -torch.where(q > 0, q * log_q, 0).sum(-1)


def draw(probs, u):
    """The token that the uniform number u picks by inverse CDF: the first y with F(y) > u. (..., V), (...) -> (...).

    One number per token, instead of torch.multinomial's hidden generator, is what makes a rollout a function of
    (seed, step, row) alone. A token of probability 0 is never drawn.
    """
    cdf = probs.cumsum(-1)
    total = cdf[..., -1:]
    u = torch.minimum(u[..., None].to(cdf.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, u, right=True)[..., 0]


# ----------------------------------------------------------------------------------------------------------------
# Evaluation


def pass_at_k(n, c, k):
    """Unbiased Pass@k from n samples of which c are right: 1 − C(n−c, k) / C(n, k) (Chen et al., 2021).

    Ints -> float in [0, 1]. Raises ValueError when k > n (there is no unbiased estimate), or on nonsense counts.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
