"""Answers to the exercises of docs/lesson.md, each checked: try them yourself first.

The order is the lesson's. What is only to be looked at (the predictions) has its answer there.
"""

import importlib.util
import math
import sys

import pytest
import torch
from conftest import arguments_of, read_log

from common import entropy, forward_kl, kl, mixed_kl, reverse_kl
from docs import bug_hunt

# By hand: three tokens (newline, another one, END); the student never says END, the teacher wants nothing else

P, Q = (0.01, 0.01, 0.98), (0.5, 0.499, 0.001)


def value_and_gradient(divergence, q):
    student = torch.tensor(q, dtype=torch.float64).log().requires_grad_()
    value = divergence(student, torch.tensor(P, dtype=torch.float64).log())
    return value.item(), torch.autograd.grad(value, student)[0].tolist()


@pytest.mark.parametrize("divergence, value, gradient, digit", [
    (forward_kl, 6.67, (0.490, 0.489, -0.979), 6e-4),  # q − p
    (reverse_kl, 3.90, (0.0059, 0.0049, -0.0108), 6e-5),  # q · (log q/p − KL)
])  # fmt: skip
def test_three_tokens_by_hand(divergence, value, gradient, digit):
    """Forward KL pulls END up ninety times as hard as reverse KL: the gradient of reverse KL is multiplied by q."""
    found, found_gradient = value_and_gradient(divergence, Q)
    assert found == pytest.approx(value, abs=0.005) and found_gradient == pytest.approx(gradient, abs=digit)


def test_how_much_weaker_reverse_kl_is_for_a_token_that_the_student_never_says():
    """Reverse KL pulls at END with q(END) · (KL + log p(END)/q(END)): 3e-10 where q(END) = 1e-11. Forward KL keeps .98.
    In a parameter that gets no other gradient, Adam divides it by 3e-10 + 1e-8, and takes 3 % of a step. In shared ones
    it divides by the size of the other tokens' gradients, which are billions of times as large."""
    pull = lambda divergence, q: -value_and_gradient(divergence, [(1 - q) / 2, (1 - q) / 2, q])[1][2]
    assert pull(forward_kl, 1e-3) / pull(reverse_kl, 1e-3) == pytest.approx(90, rel=0.02)
    assert pull(forward_kl, 1e-11) == pytest.approx(0.98)
    assert 1e-10 < pull(reverse_kl, 1e-11) < 1e-9


# Modify: a divergence is a function of two logit tensors (..., V), (..., V) -> (...)
def symmetric_kl(student_logits, teacher_logits):
    """Jeffreys' divergence: both directions, with equal weight."""
    return forward_kl(student_logits, teacher_logits) + reverse_kl(student_logits, teacher_logits)


def generalised_jsd(student_logits, teacher_logits, beta=0.5):
    """GKD's: β·KL(p‖m) + (1−β)·KL(q‖m) with the mixture m = β·p + (1−β)·q."""
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


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
    values = [top_k_with_a_tail(*logits, k=k) for k in (1, 2, 4, 6)]
    assert (torch.stack([*values, full]).diff(dim=0) >= -1e-12).all() and torch.allclose(values[-1], full)
    p, q = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.45, 0.45, 0.05, 0.05])
    assert (p * (p / q).log())[:2].sum() < 0


# Derive
def test_the_entropy_term_is_all_that_parts_reverse_kl_from_a_reward():
    """KL(q‖p) = −H(q) − E_q[log p]. Take the entropy away, and the best student says the teacher's likeliest token."""
    teacher = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    for share_of_entropy, best in ((1.0, (0.5, 0.3, 0.2)), (0.0, (1.0, 0.0, 0.0))):
        x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([x], lr=0.1)
        for _ in range(500):
            loss = -(x.softmax(-1) * teacher).sum() - share_of_entropy * entropy(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert x.softmax(-1).tolist() == pytest.approx(best, abs=0.01)


def test_a_token_mean_lets_a_loop_drown_its_neighbours():
    """A response of 4 tokens with a KL of 2 nats, and a copy that goes on in a loop of 92 tokens at .1. Under a mean
    over tokens the short one has 4 % of the weight, under a mean over responses half of it, as each response has."""
    mask = torch.arange(96) < torch.tensor([[4], [96]])
    kls = torch.where(torch.arange(96) < 4, 2.0, 0.1)
    by_token, by_response = mask / mask.sum(), mask / mask.sum(1, keepdim=True) / len(mask)
    for weights, short, loss in ((by_token, 0.04, 0.252), (by_response, 0.5, 1.0896)):
        assert weights.sum(1).tolist() == pytest.approx([short, 1 - short])
        assert (weights * kls).sum().item() == pytest.approx(loss, abs=1e-3)


def test_a_mean_over_responses_does_not_depend_on_micro_batches(world, tmp_path):
    """In opd.py itself: the same with 1 response at a time as with 4. len(micro.mask) would be the micro-batch's."""
    old, new = "micro.mask / n_tokens", "micro.mask / micro.mask.sum(1, keepdim=True) / args.batch_size"
    source = (bug_hunt.ROOT / "opd.py").read_text(encoding="utf-8")
    assert source.count(old) == 1
    source, sizes = source.replace(old, new), dict(steps=2, eval_data="none")
    logs = [log_of(source, f"of_{n}", tmp_path, world, micro_batch_size=n, **sizes) for n in (1, 4)]
    for key in ("loss", "entropy", "grad_norm"):
        assert [row[key] for row in logs[0][1:]] == pytest.approx([row[key] for row in logs[1][1:]], rel=1e-4)


# The bug hunt: what the log shows, on models small enough for a test
def log_of(source, name, tmp_path, world, **arguments):
    """The log of a script given as text, run in process."""
    path = tmp_path / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(module.Args(**arguments_of("opd", world, **arguments), out_dir=str(tmp_path / name)))
    return read_log(tmp_path / name)


@pytest.mark.parametrize("n, lr, shows", [
    (1, 1e-3, lambda column: max(column("lr")) > 2e-3),  # it grows without end
    (2, 1e-9, lambda column: max(column("loss")) - min(column("loss")) < 1e-4),  # the same, with the weights held still
    (3, 1e-9, lambda column: column("grad_norm")[-1] > 2.5 * column("grad_norm")[0]),  # it grows, with them still
    (4, 1e-3, lambda column: column("loss")[0] < 1e-6),
    (5, 1e-3, lambda column: column("entropy")[0] > math.log(500)),  # of V = 303 tokens
])  # fmt: skip
def test_every_bug_shows_in_the_log(n, lr, shows, world, tmp_path):
    """... and not in that of the healthy script."""
    options = dict(steps=6, max_grad_norm=1e9, lr=lr, warmup_steps=2, eval_data="none")
    logs = [log_of(source, f"bug_{i}", tmp_path, world, **options) for i, source in enumerate(bug_hunt.faulty(n))]
    assert [shows(lambda key: [row[key] for row in log[1:]]) for log in logs] == [False, True]


def test_the_bug_hunt_reveals_one_line_and_asks_which_one(capsys):
    assert bug_hunt.main(["3", "--reveal"]) == 0
    assert [line[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["@", "-", "+"]
    with pytest.raises(SystemExit, match="which one"):
        bug_hunt.main([])
