"""KL math, sampling, evaluation: with one script, all that a reader needs. Read it from the top.

Nothing here knows a method. A method is two choices that stand in its own script: whose prefixes (`sample(student,
...)` or the teacher's rollouts) and which divergence (`forward_kl` or `reverse_kl`). plumbing/ may be skipped.

Notation: B sequences (b in a micro-batch) of P prompt and R response tokens, padded; N response tokens in all; H hidden
size, V vocabulary size, T temperature; p_T (p) is the frozen teacher, q_θ (q) the student. Logits at position t predict
token t + 1. KLs and entropies: nats. Arguments: student first, teacher second, though forward KL is KL(p‖q).
"""

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from plumbing.fast import Head, autocast, decoder_for, response_hidden, sampling_logits, sequence_flops, weighted_loss
from plumbing.processes import gather, is_main, rank_and_world, sum_over_processes, unsharded
from plumbing.runs import Store
from plumbing.tasks import find_answer, grade, text_of

# ----------------------------------------------------------------------------------------------------------------
# 1. KL math


def kl_by_definition(a_logits, b_logits):
    """KL(a‖b) = E_{y~a}[ log a(y) − log b(y) ], as one writes it first. (..., V), (..., V) -> (...), nats.

    forward_kl(student, teacher) is this of (teacher, student), and reverse_kl(student, teacher) of (student, teacher).
    A divergence of your own may be written like it; the two below add speed, half precision, infinities, draws."""
    log_a, log_b = a_logits.log_softmax(-1), b_logits.log_softmax(-1)
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def forward_kl(student_logits, teacher_logits, u=None):
    """KL(p_T‖q_θ) = Σ_y p_T(y) (log p_T(y) − log q_θ(y)): mass-covering; cross-entropy (SFT) less H(p_T).

    (..., V), (..., V) -> (...), nats, unreduced. Computed in fp32 where the input is half precision, in the input's
    own precision otherwise. Differentiable in the student's logits only. Finite wherever the limit is.
    u (...) random numbers in [0, 1): estimate the sum by the one token y ~ p_T that u picks, log p_T(y) − log q_θ(y);
    the gradient, −∇ log q_θ(y), is unbiased for the exact one: Proposition 1 (i).
    """
    return _KL.apply(student_logits, teacher_logits, 0.0, u)


def reverse_kl(student_logits, teacher_logits, u=None):
    """KL(q_θ‖p_T) = Σ_y q_θ(y) (log q_θ(y) − log p_T(y)): mode-seeking, a policy gradient with a dense reward.

    Shapes, units and precision as in forward_kl. u (...): estimate the sum by the one token y ~ q_θ that u picks; the
    gradient, (log q_θ(y) − log p_T(y)) ∇ log q_θ(y) with the bracket held constant, is Proposition 1 (ii).
    """
    return _KL.apply(student_logits, teacher_logits, 1.0, u)


def mixed_kl(student_logits, teacher_logits, lam, u=None):
    """λ·KL(q_θ‖p_T) + (1−λ)·KL(p_T‖q_θ), λ = lam in [0, 1]: 0 is forward_kl, 1 is reverse_kl, linear in between.

    Not the generalised JSD of GKD, which compares both with a mixture *distribution* and goes to 0 at its ends.
    Shapes, units, precision and u as in forward_kl.
    """
    return _KL.apply(student_logits, teacher_logits, float(lam), u)


class _KL(torch.autograd.Function):
    """λ·KL(q‖p) + (1−λ)·KL(p‖q) at every prefix. Its backward *is* Proposition 1 of arXiv 2605.16826.

    For a softmax, ∇ log q(y) in logit space is onehot(y) − q. Put that into the two statements of the proposition, and
    (i) is q − p, cross-entropy on soft targets; (ii) is q · (log q − log p − KL), a policy gradient with the reward
    log p − log q: −q · KL comes of the score's −q, and no baseline would change the sum. `u` draws the one token y that
    an expectation is over, and a one-hot takes the place of its distribution. The gradient is formed while the
    softmaxes are at hand: V-sized tensors are what costs time and memory, and autograd would keep several of them.
    """

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, lam, u):
        dtype = torch.promote_types(student_logits.dtype, torch.float32)  # in bf16 a KL of .0012 comes out as .0026
        log_q, log_p = (logits.to(dtype).log_softmax(-1) for logits in (student_logits, teacher_logits))
        p = log_p.exp() if lam < 1 else None
        log_ratio = torch.sub(log_q, log_p, out=log_p)  # in place, here and below: log_p and log_q are gone
        q = log_q.exp_()
        parts = []
        if lam < 1:  # (i)  ∇ KL(p‖q) = − E_{y~p}[ ∇ log q(y) ]
            expected = p if u is None else _one_hot(draw(p, u), p)
            grad = q - expected
            parts.append((1 - lam, -_times(expected, log_ratio).sum(-1), grad))
        if lam > 0:  # (ii)  ∇ KL(q‖p) = E_{y~q}[ (log q(y) − log p(y)) ∇ log q(y) ]
            expected = q if u is None else _one_hot(draw(q, u), q)
            grad = _times(expected, log_ratio)
            kl = grad.sum(-1)
            parts.append((lam, kl, grad.addcmul_(q, kl[..., None], value=-1)))
        (share, kl, grad), *other = parts
        for other_share, other_kl, other_grad in other:
            kl = share * kl + other_share * other_kl
            grad = grad.mul_(share).add_(other_grad, alpha=other_share)
        ctx.save_for_backward(grad)
        ctx.dtype = student_logits.dtype
        return kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        return (grad_output[..., None] * grad).to(ctx.dtype), None, None, None


def _one_hot(y, like):  # (...), (..., V) -> (..., V)
    return torch.zeros_like(like).scatter_(-1, y[..., None], 1.0)


def _times(probs, x):
    """probs · x, with 0 · log 0 = 0."""
    return (probs * x).masked_fill_(probs == 0, 0.0)


def entropy(logits):
    """H(softmax(logits)) = −Σ_y q(y) log q(y). (..., V) -> (...), nats, in fp32 where the input is half precision."""
    log_q = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -_times(log_q.exp(), log_q).sum(-1)


def as_one_end(logits, end_ids):
    """The logits of the same distribution with all end tokens as one: p(end) = Σ p(y) over y in end_ids.

    (..., V) -> (..., V − len(end_ids) + 1), differentiable; the one end stands last. A base student says <|endoftext|>
    where its chat teacher says <|im_end|>: told apart, reverse KL punishes the student for ending. Summing is
    coarse-graining, so by the data-processing inequality no KL grows by it (up to rounding)."""
    end_ids = torch.tensor(end_ids, device=logits.device)
    others = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device).index_fill_(0, end_ids, False)
    return torch.cat([logits[..., others], logits[..., end_ids].logsumexp(-1, keepdim=True)], -1)


def weighted_kl(divergence, student, teacher, batch, token_weights, vocab, estimator="exact", ends="apart", chunk=None):
    """Σ token_weights · divergence(q_θ, p_T) over the N response tokens of a batch of Rollouts. Padding aside, it is

        q_logits, p_logits = (model(ids).logits[:, P - 1 : -1] for model in (student, teacher))  # t − 1 predicts t
        loss = (token_weights * divergence(q_logits, p_logits)).sum()

    with the logits of one chunk of tokens at a time: together they are gigabytes. vocab: both models' ids and ends.
    divergence: forward_kl, reverse_kl or any function of two logit tensors (n, V), (n, V) -> (n,). estimator: "exact",
    or "sampled" for divergences that take `u`. ends: "as_one" compares all end tokens as one action (see as_one_end).
    token_weights (B, R): what each response token counts, e.g. mask / response tokens per process, as in the scripts;
    padding is not looked at. -> loss (), and detached Σ token_weights · the student's entropy (), ends apart (nats)."""
    device = next(student.parameters()).device  # the teacher may be elsewhere: its hidden states and head come here
    with torch.no_grad():
        teacher_hidden = response_hidden(teacher, batch).to(device)  # (N, H_T)
        teacher_head = Head(teacher, vocab, device)
    if estimator == "sampled":
        u = uniforms(batch.keys, batch.mask.shape[1], "estimate")[batch.mask.cpu()].to(device)  # (N,)

    def token_kl(student_logits, c):  # c: the slice of the N tokens that a chunk holds
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_hidden[c])
        if ends == "as_one":
            student_logits, teacher_logits = (as_one_end(x, vocab.end_ids) for x in (student_logits, teacher_logits))
        return divergence(student_logits, teacher_logits, **({"u": u[c]} if estimator == "sampled" else {}))

    return weighted_loss(token_kl, entropy, student, batch, token_weights, vocab, chunk)


# ----------------------------------------------------------------------------------------------------------------
# 2. Sampling


@dataclass
class Rollouts:
    """B sequences, prompts padded on the left to P tokens, responses on the right to R, so that position P is where
    every response begins and a loss is one slice. Padding is marked in masks, never by a token id: pad may be eos."""

    ids: torch.Tensor  # (B, P+R) token ids
    prompt_mask: torch.Tensor  # (B, P) True at prompt tokens
    mask: torch.Tensor  # (B, R) True at response tokens, the end token included
    ended: torch.Tensor  # (B,) True where the response ends in an end token, False where the cap cut it off
    keys: list  # B random keys, see uniforms
    flops: float = 0.0  # model FLOPs that sampling cost
    entropy: torch.Tensor | None = None  # (B, R) nats, of the sampler's own distribution at T = 1, if asked for

    @property
    def prompt_len(self):
        return self.prompt_mask.shape[1]

    def lengths(self):
        """-> response lengths (B,), prompt lengths (B,), in tokens, on the CPU."""
        return self.mask.sum(1).cpu(), self.prompt_mask.sum(1).cpu()

    def responses(self):
        """-> B lists of response token ids, padding removed."""
        return [row[m].tolist() for row, m in zip(self.ids[:, self.prompt_len :], self.mask)]

    def take(self, rows):
        """-> the Rollouts of these rows (a tensor of their numbers), with no more padding than they need."""
        mask, prompt_mask = self.mask[rows], self.prompt_mask[rows]
        R, P = int(mask.sum(1).max()), int(prompt_mask.sum(1).max())
        ids = self.ids[rows, self.prompt_len - P : self.prompt_len + R]
        keys = [self.keys[i] for i in rows.tolist()]
        return Rollouts(ids, prompt_mask[:, self.prompt_len - P :], mask[:, :R], self.ended[rows], keys)

    def split(self, n):
        """-> micro-batches of at most n rows, sorted by response length so that little of them is padding."""
        for rows in self.mask.sum(1).argsort(stable=True).split(n):
            yield self.take(rows)


def make_rollouts(prompts, responses, ended, keys, vocab, device):
    """Rollouts from lists of prompt ids and response ids."""
    P, R = max(map(len, prompts)), max(map(len, responses))
    ids = torch.full((len(prompts), P + R), vocab.pad_id)
    mask = torch.zeros(len(prompts), P + R, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        row = slice(P - len(prompt), P + len(response))
        ids[i, row], mask[i, row] = torch.tensor([*prompt, *response]), True
    ids, mask, ended = ids.to(device), mask.to(device), torch.tensor(ended, dtype=torch.bool, device=device)
    return Rollouts(ids, mask[:, :P], mask[:, P:], ended, keys)


@torch.no_grad()
def sample(
    model, prompts, keys, vocab, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, stream="rollout", entropies=False,
    at_once=0, cache="auto",
):  # fmt: skip
    """One response to each prompt, up to and including an end token of either model, or max_new_tokens. -> Rollouts

    prompts: B tuples of token ids; keys fix each row's random numbers; another stream, other numbers (see uniforms).
    What is sampled is softmax(logits / temperature) with top_p and top_k as given here: a checkpoint's own
    generation_config has no say. `entropies`: also record the predictive entropy (T = 1) at every token.
    at_once: so many rows at a time, 0: all; less memory, same rollouts. cache (of keys, values): growing, fixed, auto.
    """
    device, B = next(model.parameters()).device, len(prompts)
    start = make_rollouts(prompts, [()] * B, [False] * B, keys, vocab, device)
    u = uniforms(keys, max_new_tokens, stream).to(device)  # (B, R)
    end_ids = torch.tensor(vocab.end_ids, device=device, dtype=torch.long)
    tokens = torch.full((B, max_new_tokens), vocab.pad_id, device=device)
    mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)
    entropy_of = torch.zeros(B, max_new_tokens, device=device) if entropies else None
    done = torch.zeros(B, dtype=torch.bool, device=device)
    with unsharded(model), autocast(model):
        head = Head(model, vocab)
        slices = torch.arange(B, device=device).split(at_once or B)  # rows that share a key-value cache
        for rows in tqdm(slices, desc=stream, leave=False, disable=len(slices) == 1 or not is_main()):
            decoder, y = decoder_for(model, cache)(model, start.take(rows)), None  # step(None) reads the prompts
            for t in range(max_new_tokens):
                logits = head(decoder.step(y))  # (rows, V)
                y = draw(sampling_logits(logits, temperature, top_p, top_k).softmax(-1), u[rows, t])
                tokens[rows, t] = torch.where(done[rows], vocab.pad_id, y)
                mask[rows, t] = ~done[rows]
                if entropies:
                    entropy_of[rows, t] = entropy(logits)
                done[rows] |= torch.isin(y, end_ids)
                if t % 8 == 7:  # asking makes the device wait, rows that ended cost compute: so ask now and then
                    running = ~done[rows]
                    if not running.any():
                        break
                    if not running.all() and decoder.drop_all_but(running):
                        rows, y = rows[running], y[running]
    R = int(mask.sum(1).max())
    ids, mask = torch.cat([start.ids, tokens[:, :R]], 1), mask[:, :R]
    rollouts = Rollouts(ids, start.prompt_mask, mask, done, keys, entropy=entropy_of[:, :R] if entropies else None)
    rollouts.flops = sequence_flops(model, *rollouts.lengths()).sum().item()
    return rollouts


def draw(probs, u):
    """The token that u in [0, 1) picks by inverse CDF: the first y with Σ_{v <= y} p(v) > u. (..., V), (...) -> (...).

    One number per token, instead of torch.multinomial's hidden generator, is what makes a rollout a function of
    (seed, step, row) alone. A token of probability 0 is never drawn."""
    cdf = probs.cumsum(-1, dtype=torch.float64)  # in fp32 a quarter of 150,000 tokens would add nothing to the sum
    total = cdf[..., -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # u · total must not round up to total itself
    u = torch.minimum(u[..., None].to(cdf.dtype) * total, below)
    return torch.searchsorted(cdf, u, right=True)[..., 0].clamp(max=probs.shape[-1] - 1)  # NaN gives V


def uniforms(keys, n, stream):
    """(B, n) fp32 numbers in [0, 1); row i depends on (stream, *keys[i]) alone, and number j not on n.
    keys: B tuples of non-negative ints, such as (seed, step, row). So rollouts depend neither on the number of
    processes nor on micro-batches, and resuming needs no generator's state."""
    stream = zlib.crc32(stream.encode())
    rows = [np.random.default_rng((stream, *key)).random(n, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows))


class TeacherRollouts:
    """A teacher's responses to a run's prompts, sampled the first time they are asked for and read afterwards.

    Of the student only its end tokens matter: all runs beside each other with the same teacher, prompts, ends, seed and
    sampling share them. `samples` responses per prompt take turns over the epochs. Their keys are (seed, row, sample),
    whoever samples, whenever; a long response serves shorter lengths, and `longest` of several is sampled."""

    def __init__(self, teacher, run, samples, longest=0, at_once=0, **sampling):
        self.teacher, self.run, self.samples, self.longest = teacher, run, samples, longest
        self.options = dict(stream="teacher", at_once=at_once, **sampling)
        self.store = Store(teacher, run, sampling)

    def __call__(self, batch, max_new_tokens):
        """-> the Rollouts of a batch, cut at max_new_tokens. Their flops charge a response, uncut, the first time that
        this run uses it, whether or not it was found on disk."""
        wanted = [(row, epoch % self.samples) for row, epoch in zip(batch.rows, batch.epochs)]
        cap = max(max_new_tokens, self.longest)
        missing = [key for key in dict.fromkeys(wanted) if not self.store.has(key, cap)]
        if sum_over_processes(len(missing)):  # all go together, also who misses nothing: a sharded model takes them all
            asked = missing or wanted[:1]
            prompts, keys = [self.run.prompts[row] for row, _ in asked], [(self.run.args.seed, *key) for key in asked]
            new = sample(self.teacher, prompts, keys, self.run.vocab, cap, **self.options)
            found = zip(missing, new.responses(), new.ended.tolist())
            self.store.add([(*key, ids, end, cap) for key, ids, end in found])
        responses, ended = zip(*(self.store.get(key, max_new_tokens) for key in wanted))
        device = next(self.teacher.parameters()).device
        rollouts = make_rollouts(batch.prompts, responses, ended, batch.keys, self.run.vocab, device)
        sampled = torch.tensor([len(self.store.get(key, cap)[0]) for key in wanted])
        costs = sequence_flops(self.teacher, sampled, rollouts.lengths()[1]).tolist()
        rollouts.flops = sum(cost for cost, epoch in zip(costs, batch.epochs) if epoch < self.samples)
        return rollouts


# ----------------------------------------------------------------------------------------------------------------
# 3. Evaluation


def pass_at_k(n, c, k):
    """Unbiased Pass@k from n samples of which c are right: 1 − C(n−c, k) / C(n, k) (Chen et al., 2021).

    Ints -> float in [0, 1]. Raises ValueError when k > n (there is no unbiased estimate), or on nonsense counts.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(model, problems, vocab, tokenizer, args, top_p=1.0, top_k=0):
    """Sample args.eval_n responses (0: args.eval_k) to every problem and grade them. -> (metrics as of summarize,
    records, one a response). Random numbers are keyed by (seed, problem, sample): evaluations differ by the model."""
    pairs = [(i, j) for i in range(len(problems)) for j in range(args.eval_n or args.eval_k)]
    pairs.sort(key=lambda pair: len(problems[pair[0]].prompt))  # prompts of a length share a batch: less padding
    mine, asked = share_of(pairs)
    prompts, keys = [problems[i].prompt for i, _ in asked], [(args.seed, i, j) for i, j in asked]
    sampling = (args.eval_max_new_tokens, args.eval_temperature, top_p, top_k, "evaluate")
    rollouts = sample(model, prompts, keys, vocab, *sampling, entropies=True, at_once=args.eval_batch_size)
    nats = (rollouts.entropy * rollouts.mask).sum(1).tolist()
    records = []
    for (i, j), ids, ended, nat in zip(mine, rollouts.responses(), rollouts.ended.tolist(), nats):
        text = text_of(ids, tokenizer, vocab)
        right, marked = grade(text, problems[i].answer, args.grade), find_answer(text) is not None
        result = dict(response=text, correct=right, marked=marked, length=len(ids), ended=ended, nats=nat)
        records.append(dict(problem=i, sample=j, **result))
    records = sorted(gather(records), key=lambda r: (r["problem"], r["sample"]))
    return summarize(records, range(len(problems)), args.eval_k), records


def share_of(items):
    """-> this process's share of the items, and what it has to sample: the same, or any one where the share is empty,
    since sampling from a sharded model takes all processes."""
    rank, world = rank_and_world()
    mine = items[rank::world]
    return mine, mine or items[:1]


def mean_entropy(model, prompts, vocab, max_new_tokens, batch_size=256):
    """Mean predictive entropy (T = 1, nats per token) of the model's own rollouts of at most max_new_tokens on prompts,
    with the same random numbers every time. -> (entropy, model FLOPs of measuring it)"""
    mine, asked = share_of(range(len(prompts)))
    keys, options = [(0, 0, i) for i in asked], dict(stream="gate", entropies=True, at_once=batch_size)
    rollouts = sample(model, [prompts[i] for i in asked], keys, vocab, max_new_tokens, **options)
    nats, tokens = (rollouts.entropy * rollouts.mask).sum().item(), rollouts.mask.sum().item()
    nats, tokens, flops = (sum_over_processes(float(x) if mine else 0.0) for x in (nats, tokens, rollouts.flops))
    return nats / tokens, flops


def summarize(records, numbers, k):
    """What evaluate's records say about the problems of these numbers. -> avg_at_k (mean accuracy), pass_at_k
    (unbiased), avg_at_k_ci and pass_at_k_ci (half-widths of normal 95 % intervals over problems), eval_len (mean
    response length, tokens), eval_clip_ratio (fraction cut), eval_marked (fraction with a marked answer), eval_entropy
    (mean predictive entropy at T = 1 per token of these rollouts, nats), problems (how many).
    """
    by_problem = {i: [] for i in numbers}
    of_all = [r for r in records if r["problem"] in by_problem]
    for record in of_all:
        by_problem[record["problem"]].append(record)
    avg = [np.mean([r["correct"] for r in of_one]) for of_one in by_problem.values()]
    passed = [pass_at_k(len(of_one), sum(r["correct"] for r in of_one), k) for of_one in by_problem.values()]

    def half_width(values):
        return float(1.96 * np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.5  # unknown

    total = {key: sum(r[key] for r in of_all) for key in ("length", "ended", "marked", "nats")}
    return {
        "avg_at_k": float(np.mean(avg)), "pass_at_k": float(np.mean(passed)), "avg_at_k_ci": half_width(avg),
        "pass_at_k_ci": half_width(passed), "eval_len": total["length"] / len(of_all),
        "eval_clip_ratio": (len(of_all) - total["ended"]) / len(of_all), "eval_marked": total["marked"] / len(of_all),
        "eval_entropy": total["nats"] / total["length"], "problems": len(by_problem),
    }  # fmt: skip
