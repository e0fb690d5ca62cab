"""What makes it fast and small, and changes no number: the loss in chunks of tokens, decoding with a cache, FLOPs.

Read common.py first. Nothing here is needed to understand it: a token loss could be computed from all logits at once,
and sampling could read every prefix anew.
"""

import inspect
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers

from plumbing.processes import body
from plumbing.tasks import refuse

# ----------------------------------------------------------------------------------------------------------------
# From hidden states to a loss


def autocast(model):
    """The region in which a model with fp32 weights computes in bf16, if it is to: the copies of its weights that this
    takes are made once in it, so one region goes around many decode steps."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=getattr(model, "autocasts", False))


class Head:
    """A model's LM head: hidden states (n, H) -> logits (n, V), over the common vocabulary, in fp32.

    Sampler and loss both go through it, so that what is scored is what was sampled. Operands are in the precision that
    the model computes in: `weight` (V, H) and `bias` (V) are copies in it, `parameters` the model's own.
    """

    def __init__(self, model, vocab, device=None):
        head, config = model.get_output_embeddings(), model.config.get_text_config()
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


def _add_matmul(total, a, b):
    """total += a @ b, the sum in total's precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:  # on a CPU some rows at a time, in memory that is warm: fetching new pages for V rows takes longer than this
        n = len(a) if a.is_cuda else 1024
        for part, rows in zip(total.split(n), a.split(n)):
            part += _matmul(rows, b)


class _ChunkedLoss(torch.autograd.Function):
    """LM head and token loss, one chunk of tokens at a time, with the gradient formed in the forward pass.

    N response tokens times V = 151,936 fp32 logits, times the several such tensors that a KL needs (logits,
    log-probabilities and probabilities of both models, gradient), is gigabytes.
    But a token's loss needs only its own logits: so for each chunk we form them, get d loss / d logits (n, V), push
    that through the head at once, and keep only what is H wide. Nothing V-sized outlives its chunk.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, token_loss, entropy, token_weights, chunk):
        dtype = torch.promote_types(weight.dtype, torch.float32)  # many small chunks are added up: not in bf16
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=dtype)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=dtype)
        loss, mean_entropy = token_weights.new_zeros(()), token_weights.new_zeros(())

        def grad_logits(c):  # a function of its own, so that what is V wide goes when it returns
            nonlocal loss, mean_entropy
            logits = head.linear(hidden[c]).requires_grad_()  # (n, V), a leaf: forward records no graph
            with torch.enable_grad():
                capped = head.cap(logits)
                mean_entropy = mean_entropy + (entropy(capped.detach()) * token_weights[c]).sum()
                losses = token_loss(capped, c)  # (n,)
            loss = loss + (losses.detach() * token_weights[c]).sum()
            return torch.autograd.grad(losses, logits, token_weights[c].to(losses.dtype))[0]  # (n, V): Proposition 1

        for c in (slice(i, i + chunk) for i in range(0, len(hidden), chunk)):
            grad = grad_logits(c)
            if bias is not None:
                grad_bias += grad.sum(0)
            grad, states = grad.to(head.weight.dtype), hidden[c].to(head.weight.dtype)
            grad_hidden[c] = _matmul(grad, head.weight).to(hidden.dtype)
            _add_matmul(grad_weight, grad.T, states)
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
        return (*(None if g is None else g.mul_(grad_loss) for g in grads), None, None, None, None, None)


def weighted_loss(token_loss, entropy, model, batch, token_weights, vocab, chunk=None):
    """Σ token_weights · token_loss over the response tokens of a batch of rollouts.

    token_loss(logits (n, V), c) -> (n,): differentiable; c is the slice of the N = batch.mask.sum() response tokens
    that this chunk holds, in the order of tensor[batch.mask]. token_weights (B, R): what each response token counts,
    the caller's business, e.g. mask / number of response tokens in the global batch; padding is never looked at.
    entropy: common's, handed over, as nothing here imports common. chunk: tokens whose logits exist at a time.
    -> loss (), differentiable in the model's parameters, and Σ token_weights · entropy (), detached, in nats.
    """
    hidden = response_hidden(model, batch)  # (N, H): only real response tokens, so padding cannot leak
    head, token_weights = Head(model, vocab), token_weights[batch.mask].to(hidden.device)
    chunk = chunk or _chunk_size(hidden, vocab)
    return _ChunkedLoss.apply(hidden, *head.parameters, head, token_loss, entropy, token_weights, chunk)


def _chunk_size(hidden, vocab):
    """How many tokens' logits may exist at a time. On a GPU as many as half a gigabyte holds; on a CPU as many as stay
    in its cache, and enough to be worth a pass over a head that does not."""
    on_cpu = hidden.device.type == "cpu"
    tokens = max(2_500_000 // vocab.size, hidden.shape[-1] // 12) if on_cpu else 2**27 // vocab.size
    return max(16, tokens // 16 * 16)  # matrix products like multiples of 16 rows


def response_hidden(model, batch):
    """The last hidden states that predict the batch's response tokens. -> (N, H), N = batch.mask.sum().

    Every row is rolled to the left by its padding. Then it begins at column 0, and causal attention alone keeps it from
    seeing anything that is not its own past: no mask, which attention kernels are slow with, or wrong (on rows that see
    nothing at all). What stands behind a row's end is computed in vain, as padding is.
    """
    device, T = next(model.parameters()).device, batch.ids.shape[1]
    order = (torch.arange(T, device=batch.ids.device) + (~batch.prompt_mask).sum(1, keepdim=True)) % T
    is_response = torch.cat([torch.zeros_like(batch.prompt_mask), batch.mask], 1)
    T = -(-int((batch.prompt_mask.sum(1) + batch.mask.sum(1)).max()) // 128) * 128  # no row is longer; few widths
    ids, is_response = (x.gather(1, order)[:, :T].to(device) for x in (batch.ids, is_response))
    with autocast(model):
        hidden = body(model)(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)
    return hidden[:, :-1][is_response[:, 1:]]  # token t is predicted at position t − 1


@torch.no_grad()
def token_log_probs(model, batch, vocab, chunk=None):
    """log q(y_t|s_t) at T = 1 of a batch's own response tokens. -> (N,), N = batch.mask.sum(), in nats."""
    tokens, hidden = batch.ids[:, batch.prompt_len :][batch.mask], response_hidden(model, batch)
    head, n = Head(model, vocab), chunk or _chunk_size(hidden, vocab)
    log_probs = [head(h).log_softmax(-1).gather(-1, y[:, None])[:, 0] for h, y in zip(hidden.split(n), tokens.split(n))]
    return torch.cat(log_probs)


# ----------------------------------------------------------------------------------------------------------------
# Decoding


class _GrowingLayer(transformers.DynamicLayer):
    """Keys and values of one layer, (b, heads, columns, head_dim), with room for the next tokens: DynamicLayer copies
    all columns to add one, which took a fifth of the toy's decode steps with 256 rows on a CPU."""

    length, room = 0, 64  # columns that hold a token; columns added when all do

    def get_seq_length(self):
        return self.length

    def update(self, keys, values, *args, **kwargs):
        first, self.length = self.length, self.length + keys.shape[-2]
        if first == (self.keys.shape[-2] if self.is_initialized else 0):  # full
            super().update(*(F.pad(x, (0, 0, 0, self.room)) for x in (keys, values)))
        else:
            self.keys[:, :, first : self.length], self.values[:, :, first : self.length] = keys, values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class GrowingCache:
    """Decode with a KV cache that grows by a token a step, and from which ended rows are dropped."""

    def __init__(self, model, start):
        self.body, self.mask = body(model), start.prompt_mask.long()  # (b, columns): which columns hold a token
        self.ids = start.ids  # (b, q) the tokens to read: the prompts, then one a step
        self.position = (self.mask.cumsum(1) - 1).clamp(min=0)  # (b, q)
        self.cache = transformers.DynamicCache(config=model.config)
        plain = transformers.DynamicLayer  # other kinds are windows, and need no room, or no keys and values
        self.cache.layers = [_GrowingLayer() if type(layer) is plain else layer for layer in self.cache.layers]

    def step(self, y=None):
        """Read the tokens y (b,), or the prompts -> the hidden states that predict the next token (b, H)."""
        if y is not None:
            self.ids, self.position = y[:, None], self.position[:, -1:] + 1
            self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], 1)
        inputs = dict(input_ids=self.ids, position_ids=self.position, attention_mask=self.mask)
        return self.body(**inputs, past_key_values=self.cache, use_cache=True).last_hidden_state[:, -1]

    def drop_all_but(self, rows):
        """Go on with these rows only (a bool mask). -> whether that was done"""
        if not all(hasattr(layer, "batch_select_indices") for layer in self.cache.layers):
            return False  # linear attention's have none
        self.cache.batch_select_indices(rows.nonzero()[:, 0])
        self.position, self.mask = self.position[rows], self.mask[rows]
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


class FixedCache:
    """Decode with a KV cache whose shapes and addresses stay the same for many steps, so that on a GPU one step can be
    recorded as a CUDA graph and replayed: launching 28 layers from Python is said to take several times as long as
    running them.

    The cache grows by a block of columns when it is full, and moves to fewer rows when half of them have ended; after
    either, the step is recorded anew. So a long response does not make all others wait at full width.
    """

    block = 256  # columns; recording costs as much as some twenty replays

    def __init__(self, model, start):
        config, P = model.config.get_text_config(), start.prompt_len
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
        """As GrowingCache.step."""
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

    def drop_all_but(self, rows):
        """As GrowingCache.drop_all_but: once half of the rows have ended."""
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


@torch.no_grad()
def check_logits(model, vocab):
    """Refuse a model whose logits are not its last hidden states times one matrix, perhaps capped, or that decodes
    otherwise than it reads: scaled logits, a head of several layers, a state that is no key-value cache."""
    ids = torch.arange(4, device=model.device)[None]
    with autocast(model):
        expected, head = model(input_ids=ids).logits[0].float(), Head(model, vocab)  # (4, V)
        read = head(body(model)(input_ids=ids, use_cache=False).last_hidden_state[0])
        decoder = GrowingCache(model, SimpleNamespace(ids=ids[:, :3], prompt_mask=torch.ones_like(ids[:, :3]).bool()))
        decoder.step()
        decoded = head(decoder.step(ids[0, 3:]))
    for logits, of in ((read, expected), (decoded, expected[3:])):
        if (logits - of).norm() > 0.2 * of.norm():  # far more than bf16 makes of it
            how = "its hidden states times one matrix" if logits is read else "decoding with a key-value cache"
            refuse(f"take another model: {how} gives other logits than {type(model).__name__} itself")


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


def _attention_kinds(config):
    """The kinds of attention among a model's layers."""
    sliding = getattr(config, "sliding_window", None) is not None
    return set(getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"])


def decoder_for(model, cache):
    """The class that `cache` names. auto: FixedCache on a GPU, where it pays, if the model can be used that way."""
    if cache == "auto":
        config = model.config.get_text_config()
        # Not with layers that have no keys and values (linear attention) or other masks than ours (chunked attention,
        # or positions made of a mask: BLOOM); with attention kernels that take no 4-D mask; with steps that wait for
        # the device, as some mixtures of experts and positions that depend on the longest row do; and not where the
        # weights are sharded: nobody has recorded a graph of FSDP's hooks.
        usable = (
            _attention_kinds(config) <= {"full_attention", "sliding_attention"}
            and config._attn_implementation in ("sdpa", "eager")
            and "position_ids" in inspect.signature(model.base_model.forward).parameters
            and model._can_compile_fullgraph
            and "dynamic" not in str(getattr(config, "rope_parameters", None))
            and not hasattr(model, "body")
        )
        cache = "fixed" if usable and next(model.parameters()).device.type == "cuda" else "growing"
    return {"growing": GrowingCache, "fixed": FixedCache}[cache]


# ----------------------------------------------------------------------------------------------------------------
# FLOPs


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
    used = {2: 1.0, 3: getattr(config, "num_experts_per_tok", experts) / experts}  # experts are stacked, few are used
    matrices = sum(p.numel() * used[p.ndim] for p in model.parameters() if p.ndim in used and id(p) not in embeddings)
    of_layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    head_dims = [getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads for c in of_layers]
    width = sum(c.num_attention_heads * head_dim for c, head_dim in zip(of_layers, head_dims))
    n = (prompt_lens + response_lens - 1).double()
    pairs = n * (n + 1) / 2  # causal: token i attends to i tokens
    attention = 4 * pairs * width
    return 2 * matrices * n + attention + 2 * head.numel() * response_lens.double()
