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

from runs import RolloutStore, decoding_precision, gather, total, whole_weights
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


class _ChunkedLoss(torch.autograd.Function):
    """LM head and token loss, one chunk of tokens at a time, with the gradient formed in the forward pass.

    N = B·R response tokens times V = 151,936 fp32 logits, times the several such tensors that a KL needs (logits,
    log-probabilities and probabilities of both models, gradient), is gigabytes.
    But a token's loss needs only its own logits: so for each chunk we form them, get d loss / d logits (n, V), push
    that through the head at once, and keep only what is H wide. Nothing V-sized outlives its chunk.
    """

    @staticmethod
    def forward(ctx, hidden, head, bias, token_loss, weights, softcap, chunk):
        dtype = torch.promote_types(head.dtype, torch.float32)  # many small chunks are added up: not in bf16
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=dtype)
        loss, mean_entropy = weights.new_zeros(()), weights.new_zeros(())

        def grad_logits(c):  # a function of its own, so that what is V wide goes when it returns
            nonlocal loss, mean_entropy
            logits = F.linear(hidden[c], head, bias).requires_grad_()  # (n, V), a leaf: forward records no graph
            with torch.enable_grad():
                capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            mean_entropy = mean_entropy + (entropy(capped.detach()) * weights[c]).sum()
            with torch.enable_grad():
                losses = token_loss(capped, c)  # (n,)
            loss = loss + (losses.detach() * weights[c]).sum()
            return torch.autograd.grad(losses, logits, weights[c].to(losses.dtype))[0]  # (n, V): Proposition 1 at work

        for c in (slice(i, i + chunk) for i in range(0, len(hidden), chunk)):
            grad = grad_logits(c)
            grad_hidden[c] = grad @ head
            if grad_head.dtype == grad.dtype:
                grad_head.addmm_(grad.T, hidden[c])
            else:
                grad_head += grad.T @ hidden[c]
            if bias is not None:
                grad_bias += grad.sum(0)
            del grad
        ctx.grads = grad_hidden, grad_head.to(head.dtype), None if bias is None else grad_bias.to(bias.dtype)
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
    head, bias, softcap = _head(model, vocab, hidden.dtype)
    chunk, weights = chunk or _chunk(hidden, vocab), weights[batch.mask].to(hidden.device)
    return _ChunkedLoss.apply(hidden, head, bias, token_loss, weights, softcap, chunk)


def _chunk(hidden, vocab):
    """How many tokens' logits may exist at a time: what stays in a CPU's cache, or fills a GPU."""
    tokens = (2_500_000 if hidden.device.type == "cpu" else 2**27) // vocab.size
    return max(16, tokens // 16 * 16)  # matrix products like multiples of 16 rows


def weighted_kl(divergence, student, teacher, batch, weights, vocab, u=None, chunk=None):
    """Σ weights · divergence(q_θ, p_T) over the response tokens of a batch of rollouts.

    divergence: forward_kl, reverse_kl or any function of two logit tensors (n, V), (n, V) -> (n,); one that has no
    `u` argument works without the sampled estimator. u (B, R): uniform numbers for the sampled estimator.
    weights (B, R), chunk and what is returned: as in weighted_loss.
    """
    device = next(student.parameters()).device  # the teacher may be on another one: what crosses over is H wide
    with torch.no_grad():
        teacher_hidden = response_hidden(teacher, batch).to(device)  # (N, H_T)
        head, bias, softcap = _head(teacher, vocab, teacher_hidden.dtype, device)
    u = None if u is None else u[batch.mask.to(u.device)].to(device)

    def token_kl(logits, c):
        with torch.no_grad():
            teacher_logits = F.linear(teacher_hidden[c], head, bias)
            teacher_logits = teacher_logits if softcap is None else softcap * torch.tanh(teacher_logits / softcap)
        return divergence(logits, teacher_logits, **({} if u is None else {"u": u[c]}))

    return weighted_loss(token_kl, student, batch, weights, vocab, chunk)


@torch.no_grad()
def token_log_probs(model, batch, vocab, chunk=None):
    """log q(y_t|s_t) at T = 1 of a batch's own response tokens. -> (N,), N = batch.mask.sum(), in nats."""
    tokens, hidden = batch.ids[:, batch.prompt_len :][batch.mask], response_hidden(model, batch)
    head, bias, softcap = _head(model, vocab, hidden.dtype)
    log_probs = []
    for h, y in zip(hidden.split(chunk or _chunk(hidden, vocab)), tokens.split(chunk or _chunk(hidden, vocab))):
        logits = F.linear(h, head, bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        log_probs.append(logits.float().log_softmax(-1).gather(-1, y[:, None])[:, 0])
    return torch.cat(log_probs)


def response_hidden(model, batch):
    """The last hidden states that predict the batch's response tokens. -> (N, H), N = batch.mask.sum().

    Token t is predicted at position t − 1, so response tokens P … P+R−1 are scored at positions P−1 … P+R−2. A
    forward hook takes the states on their way to the LM head, because only a call of the whole model works when its
    parameters are sharded; the one position that the head itself sees is thrown away.
    """
    states = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    try:
        device = next(model.parameters()).device
        model(**{name: x.to(device) for name, x in batch.inputs().items()}, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return states[0][:, batch.prompt_len - 1 : -1][batch.mask.to(device)]


def _head(model, vocab, dtype, device=None):
    """The LM head's weight (V, H) and bias (V) or None, cropped to the common vocabulary, and its soft cap or None."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            refuse(f"{type(model).__name__} scales its logits ({name}): the chunked head does not, add it there")
    weight, bias = head.weight, getattr(head, "bias", None)
    if len(weight) > vocab.size:  # slicing only where it crops: its backward is a copy of the whole
        weight, bias = weight[: vocab.size], None if bias is None else bias[: vocab.size]
    weight, bias = weight.to(device, dtype), None if bias is None else bias.to(device, dtype)
    return weight, bias, getattr(config, "final_logit_softcapping", None)


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

    def split(self, n):
        """-> micro-batches of at most n rows, sorted by response length so that little of them is padding."""
        order = self.mask.sum(1).argsort(stable=True)
        for rows in order.split(n):
            mask, prompt_mask = self.mask[rows], self.prompt_mask[rows]
            R, P = int(mask.sum(1).max()), int(prompt_mask.sum(1).max())
            ids = self.ids[rows, self.prompt_len - P : self.prompt_len + R]
            keys = [self.keys[i] for i in rows.tolist()]
            yield Rollouts(ids, prompt_mask[:, self.prompt_len - P :], mask[:, :R], self.ended[rows], keys)


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
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        best = logits.topk(top_k).indices
        logits = torch.full_like(logits, -math.inf).scatter(-1, best, logits.gather(-1, best))
    if top_p < 1:
        sorted_logits, order = logits.sort(descending=True, stable=True)
        probs = sorted_logits.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # what came before already reaches top_p
        logits = logits.scatter(-1, order, sorted_logits.masked_fill(outside, -math.inf))
    return logits


class _GrowingCache:
    """Decode with a KV cache that grows by a token a step, and from which ended rows can be dropped."""

    def __init__(self, model, start, max_new_tokens):
        self.model, self.inputs = model, start.inputs()
        self.attention, self.position = self.inputs.get("attention_mask"), start.prompt_mask.sum(1, keepdim=True)
        self.cache = transformers.DynamicCache(config=model.config)

    def step(self, y=None):
        """Read the tokens y (b,), or the prompts -> logits of the next token (b, V)."""
        if y is not None:
            self.inputs = {"input_ids": y[:, None], "position_ids": self.position}
            self.position = self.position + 1
            if self.attention is not None:  # without padding, none is needed
                self.attention = torch.cat([self.attention, self.attention.new_ones(len(y), 1)], 1)
                self.inputs["attention_mask"] = self.attention
        return self.model(**self.inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def keep(self, rows):
        """Go on with these rows only (a bool mask). -> whether that was done"""
        self.cache.batch_select_indices(rows.nonzero()[:, 0])
        self.position = self.position[rows]
        self.attention = None if self.attention is None else self.attention[rows]
        return True


class _FixedCache:
    """Decode with a KV cache of the final size. All shapes and addresses stay the same, so that on a GPU one step can
    be recorded as a CUDA graph and replayed: launching 28 layers from Python takes ten times as long as running them.
    """

    def __init__(self, model, start, max_new_tokens):
        self.model, P = model, start.prompt_len
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=P + max_new_tokens)
        self.position = start.prompt_mask.sum(1, keepdim=True) - 1  # (B, 1), of the token read last
        self.filled = torch.tensor([P - 1], device=start.ids.device)  # its column in the cache
        self.visible = F.pad(start.prompt_mask, (0, max_new_tokens))[:, None, None]  # (B, 1, 1, P+R): cache to look at
        columns = torch.arange(P + max_new_tokens, device=start.ids.device)
        causal = columns <= columns[:P, None]  # (P, P+R)
        itself = torch.eye(P, P + max_new_tokens, dtype=torch.bool, device=start.ids.device)  # pads must see something
        self.prefill = dict(input_ids=start.ids, attention_mask=(self.visible & causal) | itself)  # (B, 1, P, P+R)
        self.prefill["position_ids"] = (start.prompt_mask.cumsum(1) - 1).clamp(min=0)
        self.ids, self.graph, self.logits, self.steps = start.ids[:, -1:].clone(), None, None, 0

    def _read(self):
        self.position.add_(1)
        self.filled.add_(1)
        self.visible.index_fill_(3, self.filled, True)
        inputs = dict(input_ids=self.ids, position_ids=self.position, attention_mask=self.visible)
        return self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def step(self, y=None):
        if y is None:
            out = self.model(**self.prefill, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1]
        self.ids.copy_(y[:, None])
        self.steps += 1
        if self.ids.device.type != "cuda" or self.steps <= 3:  # the first steps warm up what a graph cannot record
            return self._read()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._read()
        self.graph.replay()
        return self.logits

    def keep(self, rows):
        return False  # rows cannot leave a graph


@torch.no_grad()
def sample(
    model, prompts, keys, vocab, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, stream="rollout", entropies=False
):
    """One response to each prompt, up to and including an end token of either model, or max_new_tokens.

    prompts: B tuples of token ids; keys: B tuples of ints that fix each row's random numbers (see uniforms).
    What is sampled is softmax(logits / temperature) with top_p and top_k as given here: a checkpoint's own
    generation_config has no say. `entropies`: also record the predictive entropy (T = 1) at every token.
    """
    device, B = next(model.parameters()).device, len(prompts)
    start = make_rollouts(prompts, [()] * B, [False] * B, keys, vocab, device)
    u = uniforms(keys, max_new_tokens, stream).to(device)  # (B, R)
    end_ids = torch.tensor(vocab.end_ids, device=device, dtype=torch.long)
    tokens = torch.full((B, max_new_tokens), vocab.pad_id, device=device)
    mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)
    entropy_of = torch.zeros(B, max_new_tokens, device=device) if entropies else None
    done = torch.zeros(B, dtype=torch.bool, device=device)
    alive = torch.arange(B, device=device)  # the rows still in the KV cache
    was_training = model.training
    model.eval()
    with whole_weights(model), decoding_precision(model):
        decoder, y = (_FixedCache if device.type == "cuda" else _GrowingCache)(model, start, max_new_tokens), None
        for t in range(max_new_tokens):
            logits = decoder.step(y)[:, : vocab.size].float()  # (alive, V)
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


def stored_rollouts(teacher, batch, vocab, out_dir, samples, max_new_tokens, longest=None, **sampling):
    """The teacher's responses to a batch of prompts, sampled the first time they are asked for and read afterwards.

    A teacher's response does not depend on the student, so one is enough for all steps, runs and scripts with the
    same teacher, prompts and sampling arguments (see RolloutStore): that is what makes teacher prefixes cheap.
    `samples` responses per prompt take turns over the epochs. Random numbers are keyed by (0, row of the dataset,
    sample), so it does not matter who samples what, when; and a long response serves every shorter training length:
    where a run has several lengths, `longest` of them is what is sampled.
    flops charges a response the first time that this run uses it, whether or not it was found on disk.
    -> Rollouts. The store lies beside out_dir, in teacher_rollouts/, so that runs and scripts share it.
    """
    directory = os.path.join(os.path.dirname(os.path.normpath(out_dir)), "teacher_rollouts")
    store = _open_store(teacher, batch.dataset, vocab, directory, tuple(sorted(sampling.items())))
    wanted = [(row, epoch % samples) for row, epoch in zip(batch.rows, batch.epochs)]
    missing = [key for key in dict.fromkeys(wanted) if not store.has(key, max_new_tokens)]
    if total(len(missing)):  # all processes go together: a sharded teacher cannot sample alone
        keys = missing or wanted[:1]
        prompts = [batch.dataset[row] for row, _ in keys]
        cap = longest or max_new_tokens
        new = sample(teacher, prompts, [(0, *key) for key in keys], vocab, cap, stream="teacher", **sampling)
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
    body = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings)
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
