"""What every script of this repository shares: KL math, sampling, and Pass@k.

(Evaluation stands in evaluate.py; arguments, model files, processes and output directories in runs.py; data sets,
prompts and grading in tasks.py.)
Nothing here knows a method. A method is two choices that stand in its own script: whose prefixes
(`sample(student, ...)` or `stored_rollouts(teacher, ...)`) and which divergence (`forward_kl` or `reverse_kl`).

Notation: B sequences, P prompt tokens, R response tokens, T = P + R, H hidden size, V vocabulary size; p_T (p) is
the frozen teacher, q_θ (q) the student. Logits at position t predict token t + 1. KLs and entropies are in nats.
"""

from __future__ import annotations

import functools
import math
import os
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from runs import RolloutStore, body, gather, precision, total, whole_weights
from tasks import refuse

# ----------------------------------------------------------------------------------------------------------------
# KL math


class _KL(torch.autograd.Function):
    """λ·KL(q‖p) + (1−λ)·KL(p‖q) at every prefix. Its backward *is* Proposition 1 of arXiv 2605.16826.

    For a softmax, ∇ log q(y) in logit space is onehot(y) − q. Put that into the two statements of the proposition,

        (i)   ∇ KL(p‖q) = − E_{y~p}[ ∇ log q(y) ]                          =  q − p
        (ii)  ∇ KL(q‖p) =   E_{y~q}[ (log q(y) − log p(y)) ∇ log q(y) ]    =  q · (log q − log p − KL)

    so (i) is cross-entropy on soft targets, and (ii) is a policy gradient whose reward is r = log p − log q and whose
    baseline is its own mean, −KL. With `u` we draw the one token y that the expectation is over instead of summing.
    Both KLs share their softmaxes here, and the gradient is formed while they are at hand: V-sized tensors are
    what costs time and memory, and autograd would keep several of them.
    """

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, lam, u):
        dtype = torch.promote_types(student_logits.dtype, torch.float32)  # in bf16 a KL of .0012 comes out as .0026
        log_q = student_logits.to(dtype).log_softmax(-1)
        log_p = teacher_logits.to(dtype).log_softmax(-1)
        p = None if lam == 1 else log_p.exp()  # for forward KL only
        nan = 0 * (log_q[..., 0].exp() + log_p[..., 0].exp())  # 0, or NaN where logits are: softmax spreads it over V
        log_ratio = torch.sub(log_q, log_p, out=log_p)  # −r(s, y), in place, as all that is V wide
        q = log_q.exp_()
        kl, grad = nan, None
        if lam < 1:
            if u is None:
                g = q - p
                value = -p.mul_(log_ratio).nan_to_num_(0.0, math.inf, -math.inf).sum(-1)  # 0 · log 0 = 0
            else:  # a label from the teacher: ordinary SFT on y
                y = draw(p, u)[..., None]
                value, g = -log_ratio.gather(-1, y)[..., 0], q.scatter_add(-1, y, q.new_full(y.shape, -1.0))
            kl, grad = kl + (1 - lam) * value, g if lam == 0 else g.mul_(1 - lam)
        if lam > 0:
            if u is None:
                g = log_ratio.mul_(q).nan_to_num_(0.0, math.inf, -math.inf)
                value = g.sum(-1)
                g.addcmul_(q, value[..., None], value=-1)
            else:  # an action of the student, reinforced by the reward r = −log_ratio
                y = draw(q, u)[..., None]
                cost = log_ratio.gather(-1, y)
                value, g = cost[..., 0], (-q * cost).scatter_add_(-1, y, cost)
            kl, grad = kl + lam * value, g if grad is None else grad.add_(g, alpha=lam)
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
    return -(q * log_q.clamp(min=torch.finfo(q.dtype).min)).sum(-1)  # 0 · log 0 = 0


def as_one_end(logits, end_ids):
    """The logits of the same distribution with all end tokens as one: p(end) = Σ p(y) over y in end_ids.

    (..., V) -> (..., V − len(end_ids) + 1), differentiable; the one end stands last. A base student says <|endoftext|>
    where its chat teacher says <|im_end|>: told apart, reverse KL punishes the student for ending. Summing is
    coarse-graining, so by the data-processing inequality no KL grows by it.
    """
    end_ids = torch.tensor(end_ids, device=logits.device)
    others = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device).index_fill_(0, end_ids, False)
    return torch.cat([logits[..., others], logits[..., end_ids].logsumexp(-1, keepdim=True)], -1)


class Head:
    """A model's LM head: hidden states (n, H) -> logits (n, V), over the common vocabulary, in fp32.

    Sampler and loss both go through it, so that what is scored is what was sampled. Operands are in the precision that
    the model computes in: `weight` (V, H) and `bias` (V) are copies in it, `parameters` the model's own.
    """

    def __init__(self, model, vocab, device=None):
        head, config = model.get_output_embeddings(), model.config.get_text_config()
        for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
            if getattr(config, name, None) not in (None, 1, 1.0):
                refuse(f"{type(model).__name__} scales its logits ({name}): the chunked head does not, add it there")
        weight, bias = head.weight, getattr(head, "bias", None)
        if len(weight) > vocab.size:  # slicing only where it crops: its backward is a copy of the whole
            weight, bias = weight[: vocab.size], None if bias is None else bias[: vocab.size]
        dtype = torch.bfloat16 if getattr(model, "autocasts", False) else weight.dtype
        self.parameters = weight, bias
        self.weight, self.bias = (None if x is None else x.detach().to(device, dtype) for x in (weight, bias))
        self.softcap = getattr(config, "final_logit_softcapping", None)

    def __call__(self, hidden):
        return self.cap(self.linear(hidden))

    def linear(self, hidden):
        logits = _matmul(hidden.to(self.weight.dtype), self.weight.T)
        return logits if self.bias is None else logits + self.bias

    def cap(self, logits):
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _matmul(a, b):
    """a @ b for matrices; of half-precision ones in fp32, in which a GPU adds them up anyway. (A CPU lacks that kernel:
    there the product is rounded once.)"""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(torch.promote_types(a.dtype, torch.float32))


class _ChunkedLoss(torch.autograd.Function):
    """LM head and token loss, one chunk of tokens at a time, with the gradient formed in the forward pass.

    N = B·R response tokens times V = 151,936 fp32 logits, times the several such tensors that a KL needs (logits,
    log-probabilities and probabilities of both models, gradient), is gigabytes.
    But a token's loss needs only its own logits: so for each chunk we form them, get d loss / d logits (n, V), push
    that through the head at once, and keep only what is H wide. Nothing V-sized outlives its chunk.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, token_loss, weights, chunk):
        dtype = torch.promote_types(weight.dtype, torch.float32)  # many small chunks are added up: not in bf16
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=dtype)
        loss, mean_entropy = weights.new_zeros(()), weights.new_zeros(())

        def grad_logits(c):  # a function of its own, so that what is V wide goes when it returns
            nonlocal loss, mean_entropy
            logits = head.linear(hidden[c]).requires_grad_()  # (n, V), a leaf: forward records no graph
            with torch.enable_grad():
                capped = head.cap(logits)
            mean_entropy = mean_entropy + (entropy(capped.detach()) * weights[c]).sum()
            with torch.enable_grad():
                losses = token_loss(capped, c)  # (n,)
            loss = loss + (losses.detach() * weights[c]).sum()
            return torch.autograd.grad(losses, logits, weights[c].to(losses.dtype))[0]  # (n, V): Proposition 1 at work

        for c in (slice(i, i + chunk) for i in range(0, len(hidden), chunk)):
            grad = grad_logits(c)
            if bias is not None:
                grad_bias += grad.sum(0)
            grad, states = grad.to(head.weight.dtype), hidden[c].to(head.weight.dtype)
            grad_hidden[c] = _matmul(grad, head.weight).to(hidden.dtype)
            if grad.dtype == dtype:
                grad_weight.addmm_(grad.T, states)
            else:
                grad_weight += _matmul(grad.T, states)
            del grad
        ctx.grads = grad_hidden, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype)
        ctx.mark_non_differentiable(mean_entropy)
        return loss, mean_entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        if ctx.grads is None:
            raise RuntimeError("this loss gave its gradient away in its first backward pass: compute it again")
        grads, ctx.grads = ctx.grads, None  # handed over, not copied: the head's alone is V·H
        return (*(None if g is None else g.mul_(grad_loss) for g in grads), None, None, None, None)


def weighted_loss(token_loss, model, batch, weights, vocab, chunk=None):
    """Σ weights · token_loss over the response tokens of a batch of rollouts.

    token_loss(logits (n, V), c) -> (n,): differentiable; c is the slice of the N = batch.mask.sum() response tokens
    that this chunk holds, in the order of tensor[batch.mask]. weights (B, R): what each response token counts, the
    caller's business, e.g. mask / number of response tokens in the global batch; padding is never looked at.
    chunk: tokens whose logits exist at the same time.
    -> loss (), differentiable in the model's parameters, and Σ weights · entropy (), detached, in nats.
    """
    hidden = response_hidden(model, batch)  # (N, H): only real response tokens, so padding cannot leak
    head = Head(model, vocab)
    chunk, weights = chunk or _chunk(hidden, vocab), weights[batch.mask].to(hidden.device)
    return _ChunkedLoss.apply(hidden, *head.parameters, head, token_loss, weights, chunk)


def _chunk(hidden, vocab):
    """How many tokens' logits may exist at a time. On a GPU as many as half a gigabyte holds; on a CPU as many as stay
    in its cache, and enough to be worth a pass over a head that does not."""
    on_cpu = hidden.device.type == "cpu"
    tokens = max(2_500_000 // vocab.size, hidden.shape[-1] // 12) if on_cpu else 2**27 // vocab.size
    return max(16, tokens // 16 * 16)  # matrix products like multiples of 16 rows


def weighted_kl(divergence, student, teacher, batch, weights, vocab, u=None, ends="apart", chunk=None):
    """Σ weights · divergence(q_θ, p_T) over the response tokens of a batch of rollouts.

    divergence: forward_kl, reverse_kl or any function of two logit tensors (n, V), (n, V) -> (n,); one that has no
    `u` argument works without the sampled estimator. u (B, R): uniform numbers for the sampled estimator.
    ends: "apart" compares the distributions as they are, "as_one" with all end tokens as one action (see as_one_end).
    weights (B, R), chunk and what is returned: as in weighted_loss.
    """
    device = next(student.parameters()).device  # the teacher may be on another one: what crosses over is H wide
    with torch.no_grad():
        teacher_hidden = response_hidden(teacher, batch).to(device)  # (N, H_T)
        teacher_head = Head(teacher, vocab, device)
    u = None if u is None else u[batch.mask.to(u.device)].to(device)

    def token_kl(logits, c):
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_hidden[c])
        if ends == "as_one":
            logits, teacher_logits = (as_one_end(x, vocab.end_ids) for x in (logits, teacher_logits))
        return divergence(logits, teacher_logits, **({} if u is None else {"u": u[c]}))

    return weighted_loss(token_kl, student, batch, weights, vocab, chunk)


@torch.no_grad()
def token_log_probs(model, batch, vocab, chunk=None):
    """log q(y_t|s_t) at T = 1 of a batch's own response tokens. -> (N,), N = batch.mask.sum(), in nats."""
    tokens, hidden = batch.ids[:, batch.prompt_len :][batch.mask], response_hidden(model, batch)
    head, n = Head(model, vocab), chunk or _chunk(hidden, vocab)
    log_probs = [head(h).log_softmax(-1).gather(-1, y[:, None])[:, 0] for h, y in zip(hidden.split(n), tokens.split(n))]
    return torch.cat(log_probs)


def response_hidden(model, batch):
    """The last hidden states that predict the batch's response tokens. -> (N, H), N = batch.mask.sum().

    Every row is rolled to the left by its padding. Then it begins at column 0, and causal attention alone keeps it from
    seeing anything that is not its own past: no mask, which attention kernels are slow with, or wrong (on rows that see
    nothing at all). What stands behind a row's end is computed in vain, as padding is.
    """
    device, (B, T) = next(model.parameters()).device, batch.ids.shape
    order = (torch.arange(T, device=batch.ids.device) + (~batch.prompt_mask).sum(1, keepdim=True)) % T
    is_response = torch.cat([torch.zeros_like(batch.prompt_mask), batch.mask], 1)
    ids, is_response = (x.gather(1, order).to(device) for x in (batch.ids, is_response))
    with precision(model):
        hidden = body(model)(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)
    return hidden[:, :-1][is_response[:, 1:]]  # token t is predicted at position t − 1


# ----------------------------------------------------------------------------------------------------------------
# Sampling


@dataclass
class Rollouts:
    """B sequences, prompts padded on the left to P tokens, responses on the right to R, so that position P is where
    every response begins and a loss is one slice. Padding is marked in masks, never by a token id: pad may equal eos.
    """

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

    def inputs(self):
        """The model's keyword arguments for a forward pass over prompt + response."""
        mask = torch.cat([self.prompt_mask, self.mask], 1).long()
        if mask.all():  # no padding, no mask: attention may take its fastest path
            return {"input_ids": self.ids}
        return {"input_ids": self.ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

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


def uniforms(keys, n, stream):
    """(B, n) fp32 numbers in [0, 1); row i depends on (stream, *keys[i]) alone, and number j not on n.

    keys: B tuples of non-negative ints, here (seed, step, row). Whoever owns a row can draw its numbers, so rollouts
    depend neither on the number of processes nor on micro-batches, and resuming needs no generator's state.
    """
    stream = zlib.crc32(stream.encode())
    rows = [np.random.default_rng((stream, *key)).random(n, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows))


def draw(probs, u):
    """The token that the uniform number u picks by inverse CDF: the first y with F(y) > u. (..., V), (...) -> (...).

    One number per token, instead of torch.multinomial's hidden generator, is what makes a rollout a function of
    (seed, step, row) alone. A token of probability 0 is never drawn.
    """
    cdf = probs.cumsum(-1, dtype=torch.float64)  # in fp32, a quarter of 150,000 tokens would get no step at all
    total = cdf[..., -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # u · total must not round up to total itself
    u = torch.minimum(u[..., None].to(cdf.dtype) * total, below)
    return torch.searchsorted(cdf, u, right=True)[..., 0].clamp(max=probs.shape[-1] - 1)  # NaN would be past the end


def sampling_logits(logits, temperature=1.0, top_p=1.0, top_k=0):
    """The logits that are sampled from: temperature first, then the top_k most likely tokens (0: all), then the
    smallest set of most likely tokens whose probability reaches top_p. (B, V) -> (B, V); what is excluded is −inf.
    Temperature 0 keeps the most likely token only (greedy).
    """
    if temperature == 0:
        top_k, temperature = 1, 1.0
    logits, V = logits / temperature, logits.shape[-1]
    if not 0 < top_k < V and top_p >= 1:
        return logits
    best, order = logits.topk(top_k) if 0 < top_k < V else logits.sort(descending=True, stable=True)  # (B, k)
    if top_p < 1:
        probs = best.softmax(-1)
        best = best.masked_fill(probs.cumsum(-1) - probs >= top_p, -math.inf)  # what came before already reaches top_p
    return torch.full_like(logits, -math.inf).scatter(-1, order, best)


class _GrowingCache:
    """Decode with a KV cache that grows by a token a step, and from which ended rows are dropped."""

    def __init__(self, model, start):
        self.body, self.inputs = body(model), start.inputs()
        self.attention, self.position = self.inputs.get("attention_mask"), start.prompt_mask.sum(1, keepdim=True)
        self.cache = transformers.DynamicCache(config=model.config)

    def step(self, y=None):
        """Read the tokens y (b,), or the prompts -> the hidden states that predict the next token (b, H)."""
        if y is not None:
            self.inputs = {"input_ids": y[:, None], "position_ids": self.position}
            self.position = self.position + 1
            if self.attention is not None:  # without padding, none is needed
                self.attention = torch.cat([self.attention, self.attention.new_ones(len(y), 1)], 1)
                self.inputs["attention_mask"] = self.attention
        return self.body(**self.inputs, past_key_values=self.cache, use_cache=True).last_hidden_state[:, -1]

    def keep(self, rows):
        """Go on with these rows only (a bool mask). -> whether that was done"""
        self.cache.batch_select_indices(rows.nonzero()[:, 0])
        self.position = self.position[rows]
        self.attention = None if self.attention is None else self.attention[rows]
        return True


class _FixedLayer(transformers.cache_utils.StaticLayer):
    """Keys and values of one layer, (b, heads, columns, head_dim), written in place."""

    def update(self, keys, values, *args, **kwargs):
        # Under autocast Qwen3's keys are fp32, by their norm's weight, and its values bf16. Attention casts both.
        return super().update(keys.to(values.dtype), values, *args, **kwargs)

    def move(self, rows, columns):
        new = (0, 0, 0, columns - self.max_cache_len)
        self.keys, self.values = F.pad(self.keys[rows], new), F.pad(self.values[rows], new)
        self.max_cache_len = columns


class _FixedCache:
    """Decode with a KV cache whose shapes and addresses stay the same for many steps, so that on a GPU one step can be
    recorded as a CUDA graph and replayed: launching 28 layers from Python takes several times as long as running them.

    The cache grows by a block of columns when it is full, and moves to fewer rows when half of them have ended; after
    either, the step is recorded anew. So a long response does not make all others wait at full width.
    """

    block = 256  # columns; recording costs as much as some twenty replays

    def __init__(self, model, start):
        config, (B, P) = model.config.get_text_config(), start.prompt_mask.shape
        self.body, self.dtype, self.device = body(model), next(model.parameters()).dtype, start.ids.device
        kinds = _attention_kinds(config)
        self.windows = {kind: config.sliding_window if kind == "sliding_attention" else None for kind in kinds}
        self.cache = transformers.Cache([_FixedLayer(P + self.block) for _ in range(config.num_hidden_layers)])
        self.ids = start.ids  # (b, q) the tokens to read: the prompts, then one a step
        self.position = (start.prompt_mask.cumsum(1) - 1).clamp(min=0)  # (b, q)
        self.column = torch.arange(P, device=self.device)  # (q,) where in the cache they go
        self.filled = F.pad(start.prompt_mask, (0, self.block))  # (b, columns): which columns hold a token
        self.used, self.graph, self.eager_steps, self.hidden = P, None, 0, None

    def _read(self):
        columns, now, masks = torch.arange(self.filled.shape[1], device=self.device), self.column[:, None], {}
        for kind, window in self.windows.items():
            seen = self.filled[:, None, None] & (columns <= now)  # (b, 1, q, columns)
            seen = seen if window is None else seen & (columns > now - window)
            unseen = ~(seen | (columns == now))  # a token sees itself, even where it is padding: NaN else
            # In numbers to be added to the scores: of a bool, attention kernels differ in what they make.
            masks[kind] = torch.finfo(torch.bfloat16).min * unseen.to(self.dtype)
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        inputs = dict(input_ids=self.ids, position_ids=self.position, attention_mask=mask)
        return self.body(**inputs, past_key_values=self.cache, use_cache=True).last_hidden_state[:, -1]

    def step(self, y=None):
        """As _GrowingCache.step."""
        if y is None:
            hidden = self._read()
            self.ids, self.position = self.ids[:, -1:].clone(), self.position[:, -1:].clone()
            self.column = self.column[-1:].clone()
            return hidden
        if self.used == self.filled.shape[1]:
            self._move(slice(None), self.used + self.block)
        self.used += 1
        self.ids.copy_(y[:, None])
        self.position.add_(1)
        self.column.add_(1)
        self.filled.index_fill_(1, self.column, True)
        if self.device.type != "cuda":
            return self._read()
        with torch.cuda.device(self.device):
            if self.eager_steps < 2:  # loads kernels and sets up libraries, which a recording must not
                self.eager_steps += 1
                return self._read()
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=torch.cuda.Stream(self.device)):
                    self.hidden = self._read()
            self.graph.replay()
        return self.hidden

    def keep(self, rows):
        """As _GrowingCache.keep: once half of the rows have ended."""
        if 2 * rows.sum() > len(rows):
            return False
        self._move(rows, self.filled.shape[1])
        return True

    def _move(self, rows, columns):
        self.graph, self.eager_steps, self.hidden = None, 0, None
        for layer in self.cache.layers:
            layer.move(rows, columns)
        self.filled = F.pad(self.filled[rows], (0, columns - self.filled.shape[1]))
        self.ids, self.position = self.ids[rows].clone(), self.position[rows].clone()


def _attention_kinds(config):
    """The kinds of attention among a model's layers."""
    sliding = getattr(config, "sliding_window", None) is not None
    return set(getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"])


def _decoder(model, cache):
    """The decoder that `cache` names. auto: _FixedCache on a GPU, where it pays, if the model can be used that way."""
    if cache == "auto":
        config = model.config.get_text_config()
        # Not with layers that have no keys and values (linear attention) or other masks than ours (chunked attention);
        # with attention kernels that take no 4-D mask; with steps that wait for the device, as some mixtures of experts
        # do; and not where the weights are sharded: nobody has recorded a graph of FSDP's hooks.
        usable = (
            _attention_kinds(config) <= {"full_attention", "sliding_attention"}
            and config._attn_implementation in ("sdpa", "eager")
            and model._can_compile_fullgraph
            and not hasattr(model, "body")
        )
        cache = "fixed" if usable and next(model.parameters()).device.type == "cuda" else "growing"
    return {"growing": _GrowingCache, "fixed": _FixedCache}[cache]


@torch.no_grad()
def sample(
    model, prompts, keys, vocab, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, stream="rollout", entropies=False,
    batch_size=0, cache="auto",
):  # fmt: skip
    """One response to each prompt, up to and including an end token of either model, or max_new_tokens.

    prompts: B tuples of token ids; keys: B tuples of ints that fix each row's random numbers (see uniforms).
    What is sampled is softmax(logits / temperature) with top_p and top_k as given here: a checkpoint's own
    generation_config has no say. `entropies`: also record the predictive entropy (T = 1) at every token.
    batch_size: rows sampled at once, 0 for all; less memory, same rollouts. cache: growing, fixed, or auto.
    """
    device, B = next(model.parameters()).device, len(prompts)
    start = make_rollouts(prompts, [()] * B, [False] * B, keys, vocab, device)
    u = uniforms(keys, max_new_tokens, stream).to(device)  # (B, R)
    end_ids = torch.tensor(vocab.end_ids, device=device, dtype=torch.long)
    tokens = torch.full((B, max_new_tokens), vocab.pad_id, device=device)
    mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)
    entropy_of = torch.zeros(B, max_new_tokens, device=device) if entropies else None
    done = torch.zeros(B, dtype=torch.bool, device=device)
    was_training = model.training
    model.eval()
    with whole_weights(model), precision(model):
        head = Head(model, vocab)
        for alive in torch.arange(B, device=device).split(batch_size or B):  # the rows in the KV cache
            decoder, y = _decoder(model, cache)(model, start.take(alive)), None
            for t in range(max_new_tokens):
                logits = head(decoder.step(y))  # (alive, V)
                y = draw(sampling_logits(logits, temperature, top_p, top_k).softmax(-1), u[alive, t])
                tokens[alive, t] = torch.where(done[alive], vocab.pad_id, y)
                mask[alive, t] = ~done[alive]
                if entropies:
                    entropy_of[alive, t] = entropy(logits)
                done[alive] |= torch.isin(y, end_ids)
                if t % 8 == 7:  # asking costs a wait for the device, and leaving ended rows in costs their compute
                    keep = ~done[alive]
                    if not keep.any():
                        break
                    if not keep.all() and decoder.keep(keep):
                        alive, y = alive[keep], y[keep]
    model.train(was_training)
    R = int(mask.sum(1).max())
    ids, mask = torch.cat([start.ids, tokens[:, :R]], 1), mask[:, :R]
    rollouts = Rollouts(ids, start.prompt_mask, mask, done, keys, entropy=entropy_of[:, :R] if entropies else None)
    rollouts.flops = sequence_flops(model, *rollouts.lengths()).sum().item()
    return rollouts


def stored_rollouts(
    teacher, batch, vocab, out_dir, samples, max_new_tokens, longest=None, batch_size=0, **sampling
):
    """The teacher's responses to a batch of prompts, sampled the first time they are asked for and read afterwards.

    A teacher's response does not depend on the student, so one is enough for all steps, runs and scripts with the
    same teacher, prompts and sampling arguments (see RolloutStore): that is what makes teacher prefixes cheap.
    `samples` responses per prompt take turns over the epochs. Random numbers are keyed by (seed, row of the dataset,
    sample), so it does not matter who samples what, when; and a long response serves every shorter training length:
    where a run has several lengths, `longest` of them is what is sampled. batch_size: as in sample.
    flops charges a response the first time that this run uses it, whether or not it was found on disk.
    -> Rollouts. The store lies beside out_dir, in teacher_rollouts/, so that runs and scripts share it.
    """
    directory = os.path.join(os.path.dirname(os.path.normpath(out_dir)), "teacher_rollouts")
    seed = batch.keys[0][0]
    store = _open_store(teacher, batch.dataset, vocab, directory, (seed, *sorted(sampling.items())))
    wanted = [(row, epoch % samples) for row, epoch in zip(batch.rows, batch.epochs)]
    missing = [key for key in dict.fromkeys(wanted) if not store.has(key, max_new_tokens)]
    if total(len(missing)):  # all processes go together: a sharded teacher cannot sample alone
        keys = missing or wanted[:1]
        prompts = [batch.dataset[row] for row, _ in keys]
        cap = longest or max_new_tokens
        keys = [(seed, *key) for key in keys]
        new = sample(teacher, prompts, keys, vocab, cap, stream="teacher", batch_size=batch_size, **sampling)
        new = zip(missing, new.responses(), new.ended.tolist())
        store.add(gather([(*key, ids, ended, cap) for key, ids, ended in new]))
    responses, ended = zip(*(store.get(key, max_new_tokens) for key in wanted))
    device = next(teacher.parameters()).device
    rollouts = make_rollouts(batch.prompts, responses, ended, batch.keys, vocab, device)
    costs = sequence_flops(teacher, *rollouts.lengths())
    rollouts.flops = sum(cost for cost, epoch in zip(costs.tolist(), batch.epochs) if epoch < samples)
    return rollouts


@functools.lru_cache(1)
def _open_store(teacher, prompts, vocab, directory, sampling):
    return RolloutStore(directory, teacher, prompts, vocab, sampling)


def sequence_flops(model, response_lens, prompt_lens):
    """Model FLOPs of one forward pass over a prompt and its response, with the LM head at the response only.

    (B,), (B,) -> (B,) float64. Two per weight of a matrix and token, plus attention: a token sees n others through
    4·n·heads·head_dim FLOPs per layer (scores and values). The last token is predicted but never read. Sampling with a
    KV cache does the same arithmetic as one such pass, and a backward pass twice as much. Padding is not counted.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    embeddings = {id(head), id(model.get_input_embeddings().weight)}
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    used = {2: 1.0, 3: getattr(config, "num_experts_per_tok", experts) / experts}  # experts are stacked, a token uses few
    body = sum(p.numel() * used[p.ndim] for p in model.parameters() if p.ndim in used and id(p) not in embeddings)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    n = (prompt_lens + response_lens - 1).double()
    pairs = n * (n + 1) / 2  # causal: token i attends to i tokens
    attention = 4 * pairs * config.num_hidden_layers * config.num_attention_heads * head_dim
    return 2 * body * n + attention + 2 * head.numel() * response_lens.double()


# ----------------------------------------------------------------------------------------------------------------
# Evaluation


def pass_at_k(n, c, k):
    """Unbiased Pass@k from n samples of which c are right: 1 − C(n−c, k) / C(n, k) (Chen et al., 2021).

    Ints -> float in [0, 1]. Raises ValueError when k > n (there is no unbiased estimate), or on nonsense counts.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
