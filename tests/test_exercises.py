"""Answers to the exercises of docs/lesson.md, each checked: try them yourself first.

The order is the lesson's. What is only to be looked at (the predictions) has its answer there.
"""

import importlib.util
import math
import sys

import pytest
import torch
from conftest import arguments_of, read_log

from common import entropy, forward_kl, kl_by_definition, mixed_kl, reverse_kl
from docs import bug_hunt

# ----------------------------------------------------------------------------------------------------------------
# By hand: three tokens (newline, another one, END); the student never says END, the teacher wants nothing else

P, Q = (0.01, 0.01, 0.98), (0.5, 0.499, 0.001)


@pytest.mark.parametrize("kl, value, gradient", [
    (forward_kl, 6.67, (0.490, 0.489, -0.979)),  # q − p
    (reverse_kl, 3.90, (0.0059, 0.0049, -0.0108)),  # q · (log q/p − KL)
])  # fmt: skip
def test_three_tokens_by_hand(kl, value, gradient):
    """Forward KL pulls END up ninety times as hard as reverse KL: the gradient of reverse KL is multiplied by q."""
    student = torch.tensor(Q, dtype=torch.float64).log().requires_grad_()
    found = kl(student, torch.tensor(P, dtype=torch.float64).log())
    found.backward()
    assert found.item() == pytest.approx(value, abs=0.005)
    assert student.grad.tolist() == pytest.approx(gradient, abs=6e-4 if value > 5 else 6e-5)


def test_how_much_weaker_reverse_kl_is_for_a_token_that_the_student_never_says():
    """Halving q(END) halves its gradient under reverse KL, but for a logarithm, and leaves that of forward KL alone.

    The pull is q(END) · (KL + log p(END)/q(END)): 3e-10 where q(END) = 1e-11. In a parameter that gets no other gradient
    Adam divides it by 3e-10 + 1e-8, and takes 3 % of a step; in the shared ones the other tokens' gradients, which are
    billions of times as large, set the size that it divides by."""

    def pull(kl, q_end):
        student = torch.tensor([(1 - q_end) / 2, (1 - q_end) / 2, q_end], dtype=torch.float64).log().requires_grad_()
        kl(student, torch.tensor(P, dtype=torch.float64).log()).backward()
        return -student.grad[2].item()

    assert pull(forward_kl, 1e-3) / pull(reverse_kl, 1e-3) == pytest.approx(90, rel=0.02)
    assert pull(forward_kl, 1e-11) == pytest.approx(0.98)
    assert 1e-10 < pull(reverse_kl, 1e-11) < 1e-9


# ----------------------------------------------------------------------------------------------------------------
# Modify: a divergence is a function of two logit tensors (..., V), (..., V) -> (...)


def symmetric_kl(student_logits, teacher_logits):
    """Jeffreys' divergence: both directions, with equal weight."""
    return forward_kl(student_logits, teacher_logits) + reverse_kl(student_logits, teacher_logits)


def generalised_jsd(student_logits, teacher_logits, beta=0.5):
    """GKD's: β·KL(p‖m) + (1−β)·KL(q‖m) with the mixture m = β·p + (1−β)·q."""
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * kl_by_definition(log_p, log_m) + (1 - beta) * kl_by_definition(log_q, log_m)


def top_k_with_a_tail(student_logits, teacher_logits, k=2):
    """Forward KL of the teacher's k likeliest tokens and of one bin for all others: what a server can send."""
    top = teacher_logits.topk(k, -1).indices

    def binned(logits):
        rest = logits.scatter(-1, top, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logits.gather(-1, top), rest], -1)

    return forward_kl(binned(student_logits), binned(teacher_logits))


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(5, 7, dtype=torch.float64, requires_grad=True), 2 * torch.randn(5, 7, dtype=torch.float64)


def test_symmetric_kl(logits):
    """Twice the mixture at λ = ½, and the same with student and teacher exchanged."""
    assert torch.allclose(symmetric_kl(*logits), 2 * mixed_kl(*logits, lam=0.5))
    assert torch.allclose(symmetric_kl(*logits), symmetric_kl(*logits[::-1]))


def test_generalised_jsd(logits):
    """Never above the entropy of the choice between p and q (ln 2 at β = ½), and for small β, divided by it, forward
    KL; so at β = 0 itself the loss is 0 and teaches nothing."""
    assert (generalised_jsd(*logits) <= math.log(2)).all() and (generalised_jsd(*logits) > 0).all()
    assert torch.allclose(generalised_jsd(*logits, beta=1e-6) / 1e-6, forward_kl(*logits), rtol=1e-4)
    assert torch.allclose(generalised_jsd(*logits, beta=1 - 1e-6) / 1e-6, reverse_kl(*logits), rtol=1e-4)


def test_top_k_with_a_tail(logits):
    """Never above the full KL, for bins tell less than tokens; equal once all tokens but one have bins of their own.
    Without the tail it is no KL at all: it can be negative."""
    full = forward_kl(*logits)
    values = torch.stack([top_k_with_a_tail(*logits, k=k) for k in (1, 2, 4, 6)])
    assert (values <= full + 1e-12).all() and torch.allclose(values[-1], full)
    assert (values.diff(dim=0) >= -1e-12).all()
    p, q = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.45, 0.45, 0.05, 0.05])
    assert (p * (p / q).log())[:2].sum() < 0


# ----------------------------------------------------------------------------------------------------------------
# Derive


def test_the_entropy_term_is_all_that_parts_reverse_kl_from_a_reward():
    """KL(q‖p) = −H(q) − E_q[log p]: take the entropy away, and the best student is the teacher's one likeliest token."""
    student, teacher = torch.zeros(3, dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    cross_entropy = -(student.softmax(-1) * teacher).sum()
    assert reverse_kl(student, teacher).item() == pytest.approx((cross_entropy - entropy(student)).item())
    for with_entropy, best in ((True, (0.5, 0.3, 0.2)), (False, (1.0, 0.0, 0.0))):
        x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([x], lr=0.1)
        for _ in range(500):
            loss = -(x.softmax(-1) * teacher).sum() - (entropy(x) if with_entropy else 0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert x.softmax(-1).tolist() == pytest.approx(best, abs=0.01)


def mean_of_response_means(mask, n_responses):
    """token_weights (b, R) for a mean over responses of means over their tokens; opd.py has mask / n_tokens. Both counts
    are those of the global batch, per process: len(mask) would be the micro-batch's."""
    return mask / mask.sum(1, keepdim=True) / n_responses


def test_a_token_mean_lets_a_loop_drown_its_neighbours():
    """A response of 4 tokens with a KL of 2 nats, and a copy that goes on in a loop of 92 tokens at .1. Under a mean over
    tokens the short one has 4 % of the weight, under a mean over responses half of it, as each response has."""
    mask = torch.arange(96) < torch.tensor([[4], [96]])
    kls = torch.where(torch.arange(96) < 4, 2.0, 0.1)
    by_token, by_response = mask / mask.sum(), mean_of_response_means(mask, 2)
    for weights, short, loss in ((by_token, 0.04, 0.252), (by_response, 0.5, 1.0896)):
        assert weights.sum().item() == pytest.approx(1)
        assert weights[0].sum().item() == pytest.approx(short)
        assert (weights * kls).sum().item() == pytest.approx(loss, abs=1e-3)
    of_micro_batches = torch.cat([mean_of_response_means(row, 2) for row in mask.split(1)])
    assert torch.equal(of_micro_batches, by_response)


# ----------------------------------------------------------------------------------------------------------------
# The bug hunt: what the log shows, on models small enough for a test


def log_of(source, name, tmp_path, world, **arguments):
    """The log of a script given as text, run in process."""
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    known = arguments_of("opd", world, **arguments)
    module.main(module.Args(**known, out_dir=str(tmp_path / name)))
    return read_log(tmp_path / name)


@pytest.fixture(scope="module")
def healthy_logs():
    """{learning rate: the log of opd.py as it is}, filled as it is asked for."""
    return {}


@pytest.mark.parametrize("n", range(1, 6))
def test_every_bug_shows_in_the_log(n, world, tmp_path, healthy_logs):
    """1: lr grows without end. 2: at a learning rate of almost 0, every step has the same loss, as its batch is the
    same. 3: with the weights held still, grad_norm grows step by step. 4: the loss is 0. 5: an entropy above ln V."""
    lr = 1e-9 if n in (2, 3) else 1e-3
    still = dict(steps=6, max_grad_norm=1e9, lr=lr, warmup=0.2)
    healthy_text, sick_text = bug_hunt.faulty(n)
    if lr not in healthy_logs:
        healthy_logs[lr] = log_of(healthy_text, "healthy", tmp_path, world, **still)
    healthy, sick = healthy_logs[lr], log_of(sick_text, "sick", tmp_path, world, **still)
    column = lambda log, key: [row[key] for row in log[1:]]  # noqa: E731
    shows = {
        1: lambda log: max(column(log, "lr")) > 2e-3,
        2: lambda log: max(column(log, "loss")) - min(column(log, "loss")) < 1e-4,
        3: lambda log: column(log, "grad_norm")[-1] > 2.5 * column(log, "grad_norm")[0],
        4: lambda log: log[1]["loss"] < 1e-6,
        5: lambda log: log[1]["entropy"] > math.log(500),
    }[n]
    assert shows(sick) and not shows(healthy)


def test_the_bug_hunt_reveals_one_line_and_asks_which_one(capsys):
    assert bug_hunt.main(["3", "--reveal"]) == 0
    changed = [
        line for line in capsys.readouterr().out.splitlines() if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert len(changed) == 2
    with pytest.raises(SystemExit, match="which one"):
        bug_hunt.main([])
