"""KL math, the loss, sampling, evaluation: what a reader needs beside a script. Read it from the top.

A method is two choices that stand in its own script, whose prefixes and which KL. Nothing here makes them.

B sequences of T tokens, prompts of P, responses of at most R, N response tokens in all, n in a chunk; H hidden size, V
vocabulary size. q is the student, p the frozen teacher; arguments come in this order, although forward KL is KL(p‖q).
KLs and entropies are in nats. Logits at position t predict token t + 1.
"""

import contextlib
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import CompileConfig, DynamicCache, TopKLogitsWarper, TopPLogitsWarper

from plumbing.arguments import refuse
from plumbing.grading import find_answer, grade
from plumbing.models import autocast, can_be_compiled, compute_dtype, sequence_flops, static_cache
from plumbing.processes import body, gather, is_main, rank_and_world

# ----------------------------------------------------------------------------------------------------------------
# 1. KL math: logits (..., V), (..., V) -> (...), nats, unreduced, in fp32 at least; differentiable in the student only


def forward_kl(student_logits, teacher_logits):
    """KL(p‖q) = Σ_y p(y) (log p(y) − log q(y)): the student is to cover all that the teacher says."""
    return kl(teacher_logits.detach(), student_logits)


def reverse_kl(student_logits, teacher_logits):
    """KL(q‖p) = Σ_y q(y) (log q(y) − log p(y)): the student is to avoid what the teacher does not say."""
    return kl(student_logits, teacher_logits.detach())


def mixed_kl(student_logits, teacher_logits, lam):
    """λ KL(q‖p) + (1 − λ) KL(p‖q), linear in λ. Not the generalised JSD of GKD, which goes to 0 at both ends."""
    return lam * reverse_kl(student_logits, teacher_logits) + (1 - lam) * forward_kl(student_logits, teacher_logits)


def kl(a_logits, b_logits):
    """KL(a‖b) = E_{y ~ a}[ log a(y) − log b(y) ]."""
    log_a, log_b = log_probs(a_logits), log_probs(b_logits)
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def sampled_forward_kl(student_logits, teacher_logits):
    """Forward KL from one fresh token y ~ p. Its gradient, −∇ log q(y), is that of SFT: Proposition 1 (i)."""
    log_q, log_p = log_probs(student_logits), log_probs(teacher_logits.detach())
    y = draw(log_p.exp())
    return (log_p.gather(-1, y) - log_q.gather(-1, y))[..., 0]


def sampled_reverse_kl(student_logits, teacher_logits):
    """Reverse KL from one fresh token y ~ q. Its gradient, −reward · ∇ log q(y), is a policy's: Proposition 1 (ii)."""
    log_q, log_p = log_probs(student_logits), log_probs(teacher_logits.detach())
    y = draw(log_q.detach().exp())
    log_q, log_p = log_q.gather(-1, y)[..., 0], log_p.gather(-1, y)[..., 0]
    reward = (log_p - log_q).detach()  # dense: one for every token
    return -reward * (1 + log_q - log_q.detach())  # the bracket is 1, and its gradient is ∇ log q(y)


def sampled_mixed_kl(student_logits, teacher_logits, lam):
    """λ sampled reverse KL + (1 − λ) sampled forward KL: one token of each."""
    forward, reverse = (f(student_logits, teacher_logits) for f in (sampled_forward_kl, sampled_reverse_kl))
    return lam * reverse + (1 - lam) * forward


def entropy(logits):
    """H(q) = −Σ_y q(y) log q(y). (..., V) -> (...)"""
    log_q = log_probs(logits)
    return -(log_q.exp() * log_q).sum(-1)


def merge_ends(logits, end_ids):
    """The same distribution with all end tokens as one action, which stands last. (..., V) -> (..., V − ends + 1)

    A base student stops with <|endoftext|> where its chat teacher says <|im_end|>. Merging can only lower a KL."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(dtype).clamp(min=torch.finfo(dtype).min)
    is_end = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    is_end[list(end_ids)] = True
    return torch.cat([logits[..., ~is_end], logits[..., is_end].logsumexp(-1, keepdim=True)], -1)


def log_probs(logits):
    """log softmax(logits), in fp32 at least: in bf16 a KL of .0012 comes out as .0026. −inf becomes the lowest number,
    so that 0 · log 0 is 0."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(dtype).log_softmax(-1).clamp(min=torch.finfo(dtype).min)


def draw(probs, generator=None):
    """One token by inverse CDF: (..., V) -> (..., 1). A third of torch.multinomial's time at V = 152k, a tenth at 256.

    Without a generator the numbers are torch's own, which the scripts seed before every loss."""
    cdf = probs.cumsum(-1, dtype=torch.float64)  # in fp32 a quarter of 152k probabilities would add nothing
    u = torch.rand(*probs.shape[:-1], 1, dtype=torch.float64, device=probs.device, generator=generator)
    return torch.searchsorted(cdf, u * cdf[..., -1:], right=True).clamp(max=probs.shape[-1] - 1)


def seed_of(*words):
    """64 bits that depend on all the words, such as (seed, "rollouts", step), and on the rank of this process. So no
    two things of a run draw the same numbers, and a run that goes on draws what it would have drawn."""
    text = repr((*words, rank_and_world()[0]))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# ----------------------------------------------------------------------------------------------------------------
# 2. Rollouts, and the loss on them


@dataclass
class Rollouts:
    """B prompts with their responses, padded on the right. Causal attention does not look there: no mask is needed."""

    ids: torch.Tensor  # (B, T) token ids; what stands in the padding is never looked at
    mask: torch.Tensor  # (B, T) True at response tokens, the end token included
    ended: torch.Tensor  # (B,) True where the response finishes with an end token, False where it was cut
    rows: torch.Tensor  # (B,) which rows of the batch these are
    flops: float = 0.0  # model FLOPs that sampling cost
    nats: torch.Tensor | None = None  # (B,) Σ H(q) over the tokens of a response, of the sampler at T = 1, if asked for

    def lengths(self):
        """-> response lengths (B,), and prompt lengths (B,), in tokens."""
        return self.mask.sum(1), self.mask.int().argmax(1)

    def responses(self):
        """-> B lists of response token ids."""
        return [ids[mask].tolist() for ids, mask in zip(self.ids, self.mask)]

    def split(self, n):
        """-> micro-batches of at most n rows, of like length, so that little of them is padding."""
        widths = sum(self.lengths())
        for rows in widths.argsort(stable=True).split(n):
            T = max(1, int(widths[rows].max()))
            yield Rollouts(self.ids[rows, :T], self.mask[rows, :T], self.ended[rows], self.rows[rows])


def make_rollouts(prompts, responses, ended, device):
    """Rollouts from B lists of prompt ids and of response ids, and B bools."""
    ids = [torch.tensor([*prompt, *response]) for prompt, response in zip(prompts, responses)]
    masks = [torch.arange(len(row)) >= len(prompt) for row, prompt in zip(ids, prompts)]
    ids, mask = (pad_sequence(rows, batch_first=True).to(device) for rows in (ids, masks))
    return Rollouts(ids, mask, torch.tensor(ended, device=device), torch.arange(len(ids), device=device))


def teacher_rollouts(teacher, batch, max_new_tokens):
    """The responses that the data hold for a batch, cut at max_new_tokens. -> Rollouts. The teacher generates nothing
    here; the FLOPs of sampling from it are counted at a response's first use, uncut."""
    cut = [response[:max_new_tokens] for response in batch.responses]
    ended = [e and len(response) <= max_new_tokens for e, response in zip(batch.ended, batch.responses)]
    rollouts = make_rollouts(batch.prompts, cut, ended, teacher.device)
    new = torch.tensor([len(response) * first for response, first in zip(batch.responses, batch.first_use)])
    rollouts.flops = sequence_flops(teacher, new[new > 0], rollouts.lengths()[1].cpu()[new > 0])
    return rollouts


def distillation_loss(
    divergence, student, teacher, batch, token_weights, end_ids=(), ends="apart", vocab_size=None, chunk=None
):
    """Σ token_weights · divergence(q, p) over the N response tokens of a batch. -> loss (), and Σ token_weights · H(q)
    (), detached and with all end tokens apart. Padding aside, for prompts of P tokens it is

        q_logits, p_logits = (model(ids).logits[:, P - 1 : -1] for model in (student, teacher))
        loss = (token_weights[:, P:] * divergence(q_logits, p_logits)).sum()

    divergence: any function of two logit tensors (n, V), (n, V) -> (n,). token_weights (B, T): what each token counts,
    such as 1 / number of response tokens. ends: "as_one" compares all of end_ids as one action. vocab_size:
    logits beyond the ids of the tokenizer are cropped. chunk: tokens whose logits exist at a time."""
    with torch.no_grad():
        teacher_hidden, teacher_head = response_hidden(teacher, batch), head_of(teacher, vocab_size)  # (N, H_T)

    def token_loss(student_logits, c):  # c: the slice of the N tokens that a chunk holds
        with torch.no_grad():
            teacher_logits = logits_of(teacher, teacher_hidden[c], *teacher_head)
        if ends == "as_one":
            student_logits, teacher_logits = (merge_ends(x, end_ids) for x in (student_logits, teacher_logits))
        return divergence(student_logits, teacher_logits)

    return weighted_loss(token_loss, student, batch, token_weights, vocab_size, chunk)


# What follows in this section is memory, not method: the same loss for some tokens at a time.


def response_hidden(model, batch):
    """-> (N, H) the hidden states that predict the N response tokens: those one position before them."""
    with autocast(model):
        hidden = body(model)(input_ids=batch.ids, use_cache=False).last_hidden_state  # (B, T, H)
    return hidden[:, :-1][batch.mask[:, 1:]]


def head_of(model, vocab_size=None):
    """The LM head: its weight (V, H) and bias (V,), if it has one, detached, cropped, in its product's precision."""
    return [x.detach()[:vocab_size].to(compute_dtype(model)) for x in model.get_output_embeddings().parameters()]


def logits_of(model, hidden, weight, bias=None):
    """(n, H) -> (n, V). A head that does anything else is refused by check_models."""
    return capped(model, F.linear(hidden.to(weight.dtype), weight, bias))


def capped(model, logits):
    """Logits within Gemma's bound, where the model has one."""
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def weighted_loss(token_loss, model, batch, token_weights, vocab_size=None, chunk=None):
    """Σ token_weights · token_loss(logits (n, V), c) -> (n,), for a chunk c of the N response tokens at a time, in the
    order of tensor[batch.mask]. -> loss (), and Σ token_weights · H(q) (), detached."""
    hidden, weights, head = response_hidden(model, batch), token_weights[batch.mask], model.get_output_embeddings()
    if chunk is None:  # 128 MiB of logits on a GPU; on a CPU what its cache holds, or what pays for reading the head
        V, H = head.weight.shape
        chunk = max(1, 2**25 // V) if hidden.is_cuda else max(3_000_000 // V, H // 12, 1)
    return _InChunks.apply(model, token_loss, weights, vocab_size, chunk, hidden, *head.parameters())


class _InChunks(torch.autograd.Function):
    """LM head and token loss for some tokens at a time: N × V logits would be gigabytes. `forward` makes the gradients,
    too, chunk by chunk, and frees the logits; `backward` only scales them. In logit space they are q − p for forward
    KL, and q · (log q/p − KL) for reverse KL. The head's are added up in fp32."""

    @staticmethod
    def forward(ctx, model, token_loss, weights, vocab_size, chunk, hidden, weight, *bias):
        head = head_of(model, vocab_size)
        grad_hidden, grad_weight, *grad_bias = (torch.zeros_like(x) for x in (hidden, weight, *bias))
        loss, weighted_entropy = weights.new_zeros(2)
        for c in (slice(i, i + chunk) for i in range(0, len(hidden), chunk)):
            states = hidden[c].to(head[0].dtype)  # (n, H)
            logits = F.linear(states, *head).requires_grad_()  # (n, V), a leaf
            with torch.enable_grad():
                losses = token_loss(capped(model, logits), c)  # (n,)
            (grad,) = torch.autograd.grad(losses, logits, weights[c].to(losses.dtype))  # (n, V)
            loss = loss + (weights[c] * losses.detach()).sum()
            weighted_entropy = weighted_entropy + (weights[c] * entropy(capped(model, logits.detach()))).sum()
            del logits, losses
            grad_hidden[c] = grad @ head[0]
            part = grad_weight[: len(head[0])]  # a cropped head is shorter than the model's
            part.addmm_(grad.T, states) if grad.dtype == part.dtype else part.add_(grad.T @ states)
            for part in grad_bias:
                part[: grad.shape[1]] += grad.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, *grad_bias)
        ctx.mark_non_differentiable(weighted_entropy)
        return loss, weighted_entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        return None, None, None, None, None, *(grad * grad_loss for grad in ctx.saved_tensors)


# ----------------------------------------------------------------------------------------------------------------
# 3. Sampling


@torch.no_grad()
def sample(
    model, prompts, end_ids, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, seed=0, vocab_size=None,
    entropies=False, batch_size=None, prompt_len=0, cache=None,
):  # fmt: skip
    """One response to each prompt (a list of token ids), up to and including an end token, or max_new_tokens.
    -> Rollouts. What is sampled is softmax(logits / temperature) with top_k and top_p as given here, whatever the
    checkpoint's generation_config says; temperature 0 is greedy. entropies: also add up H(q) at T = 1.

    batch_size: rows at a time (default: all). cache: "dynamic" grows, and rows that have finished leave it; "static"
    has its size from the start; "compiled" is static, and the model compiled: a GPU then replays one recorded step in
    place of a thousand launches. Other shapes compile anew, so batches are filled up, and prompts padded to prompt_len.
    Default: what check_models has found to work."""
    cache, n = cache or getattr(model, "cache_kind", "dynamic"), batch_size or len(prompts)
    generator = torch.Generator(model.device).manual_seed(seed)

    def pick(logits):  # (b, V) -> (b, 1)
        if temperature == 0:
            return logits.argmax(-1, keepdim=True)
        return draw(filtered(logits, temperature, top_p, top_k).softmax(-1), generator)

    responses, ended, nats = [], [], []
    for i in tqdm(range(0, len(prompts), n), desc="sampling", leave=False, disable=len(prompts) <= n or not is_main()):
        part = prompts[i : i + n]
        rows = part if cache == "dynamic" else part + part[:1] * (n - len(part))
        P = max(map(len, rows)) if cache == "dynamic" else max(prompt_len, *map(len, rows))
        tokens, sums = _decode(model, rows, P, max_new_tokens, pick, end_ids, vocab_size, entropies, cache)
        for row in tokens[: len(part)].tolist():
            end = next((t for t, y in enumerate(row) if y in end_ids), None)
            responses.append(row if end is None else row[: end + 1])
            ended.append(end is not None)
        nats.append(sums[: len(part)])
    rollouts = make_rollouts(prompts, responses, ended, model.device)
    rollouts.flops, rollouts.nats = sequence_flops(model, *rollouts.lengths()), torch.cat(nats)
    return rollouts


def _decode(model, prompts, P, R, pick, end_ids, vocab_size, entropies, cache):
    """-> (b, up to R) tokens, of which those after an end token mean nothing; and (b,) Σ H(q) up to the end token."""
    device, b, dynamic = model.device, len(prompts), cache == "dynamic"
    pads = [P - len(prompt) for prompt in prompts]  # here on the left, so that all responses begin at column P
    ids = torch.tensor([[0] * n + list(prompt) for n, prompt in zip(pads, prompts)], device=device)  # (b, P)
    mask = torch.tensor([[0] * n + [1] * (P + R - n) for n in pads], device=device)  # (b, P + R)
    position, ends = (mask[:, :P].cumsum(1) - 1).clamp(min=0), torch.tensor(list(end_ids), device=device).long()
    state = DynamicCache(config=model.config) if dynamic else static_cache(model, b, P + R)
    rows, tokens = torch.arange(b, device=device), torch.zeros(b, R, dtype=torch.long, device=device)
    running, nats = torch.ones(b, dtype=torch.bool, device=device), torch.zeros(b, device=device)
    for t in range(R):
        compiled = cache == "compiled" and t > 0  # not the prompts, which are read once
        forward = model.get_compiled_call(CompileConfig(dynamic=False)) if compiled else model
        seen = mask[:, : P + t] if dynamic else mask  # a static cache hides by position what is not written yet
        output = forward(
            input_ids=ids, attention_mask=seen, position_ids=position, past_key_values=state, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        logits = output.logits[:, -1, :vocab_size].float()  # (b, V)
        y = pick(logits)
        tokens[rows, t] = y[:, 0]
        if entropies:
            nats[rows] += entropy(logits) * running[rows]
        running[rows] &= ~torch.isin(y[:, 0], ends)
        if dynamic or t % 8 == 7:  # asking makes a GPU wait
            left = running[rows]
            if not left.any():
                break
            # Linear attention's layers cannot drop rows: there those that have finished go on, unheard.
            if dynamic and not left.all() and all(hasattr(layer, "batch_select_indices") for layer in state.layers):
                state.batch_select_indices(left.nonzero()[:, 0])
                rows, y, mask, position = rows[left], y[left], mask[left], position[left]
        ids, position = y, position[:, -1:] + 1
    return tokens[:, : t + 1], nats


def filtered(logits, temperature, top_p, top_k):
    """(b, V) logits at a temperature, then without what top_k and top_p leave out, by transformers' own filters."""
    logits = logits / temperature
    logits = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    return TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits


@torch.no_grad()
def check_models(*models):
    """Refuse a model that would be scored or sampled here otherwise than it computes: one with scaled logits, a head of
    several layers, a state that is no key-value cache. On a GPU, find out whether it can be compiled."""
    for model in dict.fromkeys(models):
        try:
            trouble = _trouble(model, "dynamic")
        except Exception as error:  # whatever an architecture raises that is used as it was not meant to be
            trouble = f"{type(error).__name__}: {error}"
        if trouble:
            refuse(f"take another model: {type(model).__name__} cannot be sampled or scored here ({trouble})")
        if model.device.type == "cuda" and can_be_compiled(model):
            with contextlib.suppress(Exception):
                model.cache_kind = "dynamic" if _trouble(model, "static") else "compiled"
        if hasattr(model, "reshard"):  # FSDP: a forward pass without a backward pass leaves its root gathered
            model.reshard()


def _trouble(model, cache):
    """What is wrong, or None. Four prompts of different lengths are sampled, some of them to an end; then each row is
    read by the model itself, alone and without padding or cache."""
    tolerance = 1e-3 if compute_dtype(model) == torch.float32 else 0.2
    prompts, ends = [range(3, 3 + n) for n in (9, 2, 5, 7)], range(0, model.config.get_text_config().vocab_size, 3)
    rollouts = sample(model, [list(prompt) for prompt in prompts], ends, 8, entropies=True, cache=cache)
    logits = []
    for ids, response_len, prompt_len in zip(rollouts.ids, *rollouts.lengths()):
        with autocast(model):
            own = model(input_ids=ids[None, : prompt_len + response_len]).logits[0, prompt_len - 1 : -1]
        logits.append(own.float())
    scored = logits_of(model, response_hidden(model, rollouts), *head_of(model)).float()
    sampled, own = rollouts.nats, torch.stack([entropy(x).sum() for x in logits])
    for what, a, b in (("the loss", scored, torch.cat(logits)), ("sampling with a cache", sampled, own)):
        if not (a - b).norm() <= tolerance * b.norm():
            return f"{what} gives other logits than the model itself, or logits that are not finite"


# ----------------------------------------------------------------------------------------------------------------
# 4. Evaluation


def pass_at_k(n, c, k):
    """Unbiased Pass@k from n samples of which c are right: 1 − C(n−c, k) / C(n, k) (Chen et al., 2021).

    Ints -> float in [0, 1]. Raises ValueError when k > n (there is no unbiased estimate), or on nonsense counts."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def respond(model, problems, tokens, n, seed, **sampling):
    """n responses to every problem, graded, by all processes together. -> records, one a response: problem and sample
    (numbers), prompt, answer, level, response (text), response_ids, correct (None without an answer), marked (does it
    mark an answer), length, ended, nats (Σ H(q) over its tokens)"""
    pairs = [(i, j) for i in range(len(problems)) for j in range(n)]
    pairs.sort(key=lambda pair: len(problems[pair[0]].prompt))  # prompts of a length share a batch: less padding
    rank, world = rank_and_world()
    mine, records = pairs[rank::world], []
    if mine:
        prompts, options = [problems[i].prompt for i, _ in mine], dict(vocab_size=tokens.vocab_size, entropies=True)
        rollouts = sample(model, prompts, tokens.end_ids, seed=seed, **options, **sampling)
        found = zip(mine, rollouts.responses(), rollouts.ended.tolist(), rollouts.nats.tolist())
        for (i, j), ids, ended, nats in found:
            p, text = problems[i], tokens.decode(ids)
            prompt = [*p.before, {"role": "user", "content": p.question}] if p.before else p.question
            record = dict(problem=i, sample=j, prompt=prompt, answer=p.answer, level=p.level, response=text)
            right, marked = None if p.answer is None else grade(text, p.answer), find_answer(text) is not None
            record |= dict(response_ids=ids, correct=right, marked=marked, length=len(ids), ended=ended, nats=nats)
            records.append(record)
    return sorted(gather(records), key=lambda record: (record["problem"], record["sample"]))


def summarize(records, k):
    """Metrics of records: avg_at_k (share solved), pass_at_k (unbiased), eval_ended (share finished), eval_useful (both
    solved and finished), eval_marked (with a marked answer), eval_len (mean length, tokens), each also as name_ci, the
    half-width of its normal 95 % interval over problems, .5 where there is one; eval_entropy (nats per token); problems
    (how many). What is solved is a share of the problems that have an answer."""
    by_problem = {}
    for record in records:
        by_problem.setdefault(record["problem"], []).append(record)
    problems, metrics = by_problem.values(), {}
    keys = {"eval_len": "length", "eval_ended": "ended", "eval_marked": "marked"}
    columns = {name: [np.mean([r[key] for r in one]) for one in problems] for name, key in keys.items()}
    answered = [one for one in problems if one[0]["correct"] is not None] or [[dict(correct=False, ended=False)]]
    counts = [(len(one), sum(r["correct"] for r in one)) for one in answered]
    columns["avg_at_k"] = [c / n for n, c in counts]
    columns["pass_at_k"] = [pass_at_k(n, c, min(k, n)) for n, c in counts]
    columns["eval_useful"] = [np.mean([r["correct"] and r["ended"] for r in one]) for one in answered]
    for name, values in columns.items():
        metrics[name] = float(np.mean(values))
        metrics[name + "_ci"] = 1.96 * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.5
    nats, tokens = (sum(r[key] for r in records) for key in ("nats", "length"))
    return metrics | {"eval_entropy": nats / tokens, "problems": len(problems)}


def evaluate(model, problem_sets, tokens, args):
    """Sample --eval_k responses to every problem of all sets (one if greedy), and grade them. -> metrics as summarize
    has them, of several sets the means, and `metric/set` for each; and the records, each with its set"""
    n, results, records = args.eval_k if args.eval_temperature else 1, {}, []
    longest = max(len(p.prompt) for problems in problem_sets.values() for p in problems)  # one shape for all sets
    sampling = dict(max_new_tokens=args.eval_max_new_tokens, temperature=args.eval_temperature)
    sampling |= dict(batch_size=args.eval_batch_size, prompt_len=longest)
    for name, problems in problem_sets.items():
        found = respond(model, problems, tokens, n, seed_of(args.seed, "evaluate", name), **sampling)
        results[name] = summarize(found, args.eval_k)
        records += [{"set": name} | record for record in found]
    columns = {key: np.array([m[key] for m in results.values()]) for key in next(iter(results.values()))}
    metrics = {key: float(x.mean()) for key, x in columns.items()} | {"problems": int(columns["problems"].sum())}
    # the half-width of a mean over independent sets
    metrics |= {key: float((x**2).sum() ** 0.5 / len(x)) for key, x in columns.items() if key.endswith("_ci")}
    each = {f"{key}/{name}": value for name, m in results.items() for key, value in m.items() if len(results) > 1}
    return metrics | each, records
