"""Checkpoints: what can be known without weights is checked first; models are loaded in the precision asked for."""

import copy
import dataclasses
import functools
import hashlib
import math
import os
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
import transformers
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint

from plumbing.arguments import refuse
from plumbing.data import encode_prompts, encode_responses
from plumbing.processes import device_here, gather, layers, say, shard, whole

# ----------------------------------------------------------------------------------------------------------------
# Tokens


@dataclass(eq=False)
class Tokens:
    """What the models must agree on before their distributions can be compared."""

    tokenizer: object  # the student's, with the teacher's chat template
    end_ids: tuple[int, ...]  # the end tokens of all models: a rollout stops at any of them
    vocab_size: int  # largest id of a token + 1: models may have rows beyond it, for padding

    def decode(self, ids):
        """A response as text, without end tokens, which not every tokenizer takes for special ones."""
        return self.tokenizer.decode([i for i in ids if i not in self.end_ids], skip_special_tokens=True)


def load_tokens(args, problem_sets):
    """Load the tokenizers and configs of the models that args names (student and teacher, or model), and encode prompts
    and responses of problem_sets: a list of (name, problems, how many tokens will be added). -> Tokens

    What two models must agree on is checked here. An id must mean the same token to both, and a prompt must become the
    same ids; all end tokens must be among those that can be said. Which token ends, and which one pads, may differ.
    Rows that no prompt can be made of are left out of the lists and counted."""
    paths = {role: getattr(args, role) for role in ("student", "teacher", "model") if hasattr(args, role)}
    configs = {role: load_config(path, role).get_text_config() for role, path in paths.items()}
    tokenizers = {role: _load(transformers.AutoTokenizer, path, role) for role, path in paths.items()}
    student = next(iter(tokenizers.values()))
    asker = tokenizers.get("teacher", student)  # its chat template serves both
    for _, problems, _ in problem_sets:
        encode_prompts(problems, asker, args.thinking, args.instruction)

    def differs(tokenizer, thinking, n):  # whether it makes other prompts of the first n problems
        again = [dataclasses.replace(p) for p in problem_sets[0][1][:n]]
        encode_prompts(again, tokenizer, thinking, args.instruction)
        return any(p.prompt != before.prompt for p, before in zip(again, problem_sets[0][1]))

    # The same tokens at the same ids, and the same prompts
    if asker is not student:
        student.chat_template, trouble = asker.chat_template, None
        mine, its, texts = student.get_vocab(), asker.get_vocab(), {i: token for token, i in asker.get_vocab().items()}
        for token, i in mine.items():
            if its.get(token, i) != i or texts.get(i, token) != token:
                trouble = f"id {i} is {token!r} for the student and {texts.get(i)!r} for the teacher"
        if trouble or differs(student, args.thinking, 256):
            used = asker.convert_ids_to_tokens(sorted({i for p in problem_sets[0][1] for i in p.prompt}))
            lacks = ", ".join(repr(token) for token in used if token not in mine)[:99]
            trouble = trouble or f"the prompts use {lacks or 'other merges'}"
            refuse(f"--student and --teacher tokenize differently ({trouble}): choose both from one family")
    if args.thinking and not differs(asker, False, 256):
        say("warning: --thinking changes nothing: the chat template has no switch of this name")

    # A vocabulary that all tokens of the tokenizers are in, without the rows beyond them
    sizes = {role: config.vocab_size for role, config in configs.items()}
    added = {token for tokenizer in tokenizers.values() for token in tokenizer.get_added_vocab()}
    known = [i for tokenizer in tokenizers.values() for token, i in tokenizer.get_vocab().items() if token not in added]
    largest = max(*known, *(max(p.prompt) for _, problems, _ in problem_sets for p in problems))
    if largest >= min(sizes.values()):
        refuse(  # (Gemma 3's tokenizer has one more token, for images, than its small models, which no prompt has)
            f"the tokenizer has ids up to {largest}, but the vocabulary sizes in config.json are {sizes}: the "
            "tokenizer is another model's, or model.resize_token_embeddings was forgotten"
        )
    vocab_size = min(*sizes.values(), max(max(tokenizer.get_vocab().values()) + 1 for tokenizer in tokenizers.values()))
    if vocab_size < max(sizes.values()):
        say(f"vocabulary sizes are {sizes}: logits cropped to the tokenizer's {vocab_size}")

    # End tokens, all of which can be said
    end_ids = set()
    for role, path in paths.items():
        for ids in (configs[role].eos_token_id, _generation_end(path), tokenizers[role].eos_token_id):
            end_ids.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    if beyond := [i for i in end_ids if not 0 <= i < vocab_size]:
        names = asker.convert_ids_to_tokens(beyond)
        refuse(f"the end tokens {beyond} ({names}) lie beyond the vocabulary of {vocab_size} that all models have")
    if not end_ids:
        refuse(f"no response could ever end: set an end token, eos_token_id below {vocab_size}, in a config.json")

    for name, problems, new in problem_sets:
        _leave_out_rows(name, problems, new, asker, room=min(map(_context, configs.values())))
    encode_responses(problem_sets[0][1], asker, asker.eos_token_id, vocab_size)
    return Tokens(student, tuple(sorted(end_ids)), vocab_size)


def _leave_out_rows(name, problems, new, tokenizer, room):
    """Take out of a list what cannot be asked within `room` tokens, of which `new` are to be added, and say how many
    rows that was; refuse to take all."""
    special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    control, least = re.compile("|".join(special) or r"(?!)"), min(len(p.prompt) for p in problems)
    all_text = lambda p: "\n".join([p.question, p.response or "", *(turn["content"] for turn in p.before)])
    unknown = f"have text that the tokenizer of {tokenizer.name_or_path!r} does not know: is it made for these data?"
    long = f"are too long for the context of {room}: the shortest prompt has {least} tokens, {new} are to be added"
    for why, is_out in (
        (unknown, lambda p: p.prompt.count(tokenizer.unk_token_id) > 0.2 * len(p.prompt)),
        ("have control tokens such as <|im_end|> in their text", lambda p: control.search(all_text(p))),
        (long, lambda p: len(p.prompt) + new > room),
    ):
        kept = [p for p in problems if not is_out(p)]
        if not kept:
            refuse(f"{name}: all rows {why}")
        if len(kept) < len(problems):
            say(f"{name}: left out {len(problems) - len(kept)} rows that {why}")
        problems[:] = kept


def _context(config):
    """The tokens that a model can read. Beyond longrope's first length the keys of a cache are others than without."""
    rope = getattr(config, "rope_parameters", None) or {}
    first = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return first or getattr(config, "max_position_embeddings", None) or math.inf


def _generation_end(path):
    """The end tokens in a checkpoint's generation_config.json, of which nothing else is used."""
    try:
        return transformers.GenerationConfig.from_pretrained(path).eos_token_id
    except Exception as error:  # most often there is none, which is fine
        if os.path.exists(os.path.join(path, "generation_config.json")):
            refuse(f"generation_config.json in {path!r} is damaged: mend or delete it ({error})")


# ----------------------------------------------------------------------------------------------------------------
# Precision


def faster_precision(model):
    """What --precision auto stands for here -> "fp32" or "bf16". A model of less than 10 million parameters stays in
    fp32; for others matrices are multiplied in either precision, and all take what is faster in the main process."""
    ms = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)) if model.num_parameters() >= 10e6 else ():
        a = torch.ones(1024, 1024, dtype=dtype, device=device_here())
        timer = Timer("(a @ a).sum().item()", globals={"a": a}, num_threads=torch.get_num_threads())
        ms[name] = 1000 * min(timer.timeit(1).median for _ in range(3))
    best = gather([min(ms, key=ms.get, default="fp32")])[0]
    if ms:
        say(f"--precision auto is {best}: a product takes {ms['fp32']:.1f} ms in fp32, {ms['bf16']:.1f} ms in bf16")
    return best


def autocast(model):
    """The region in which a model with fp32 weights computes in bf16, if it is to."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=getattr(model, "autocasts", False))


def compute_dtype(model):
    """The precision of a model's products."""
    return torch.bfloat16 if getattr(model, "autocasts", False) else model.dtype


# ----------------------------------------------------------------------------------------------------------------
# Models


def load_student(args):
    """-> the student, with fp32 weights, which small learning rates need; and what samples in its place. In fp32 and in
    one process that is the student itself. Otherwise it is a plain copy of it, whole, in the run's precision: decoding
    under autocast casts all weights at every step, and from a sharded model it takes a collective a layer.
    args.precision becomes what "auto" stands for."""
    student = load_model(args.student, "fp32").requires_grad_()
    args.precision = faster_precision(student) if args.precision == "auto" else args.precision
    defaults = [name for name in ("data", "eval_data", "lr") if getattr(args, name) == getattr(type(args), name)]
    if defaults and student.num_parameters() >= 10e6:
        values = ", ".join(f"--{name} {getattr(args, name)}" for name in defaults)
        say(f"warning: {values}: made for the toy; others take an lr of 5e-7 to 2e-6, begin from recipes/")
    sampler = student
    if args.precision == "bf16" or dist.is_initialized():
        sampler = cast(copy.deepcopy(student).requires_grad_(False), args.precision)
    student.autocasts = args.precision == "bf16"
    if args.gradient_checkpointing:
        for layer in layers(student):  # transformers' own switch needs train mode, and with it dropout
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return shard(student) if dist.is_initialized() else student, sampler


def cast(model, precision):
    """The model with its parameters in this precision. Its buffers stay: rotary frequencies must not be rounded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    return model


@torch.no_grad()
def refresh(sampler, student):
    """Give the copy that samples the student's weights; in place, since recorded steps hold its addresses."""
    if sampler is not student:
        for mine, new in zip(sampler.parameters(), student.parameters()):
            mine.copy_(whole(new))


def load_teacher(args):
    """-> the teacher, frozen, in the run's precision."""
    teacher = load_model(args.teacher, args.precision)
    return shard(teacher) if dist.is_initialized() else teacher


def load_model(path, precision):
    """A frozen causal LM on this process's device, in eval mode: with dropout, sampler and scorer would disagree."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    options = dict(dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    model, report = _load(transformers.AutoModelForCausalLM, path, "model", **options)
    made_up = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    if made_up:
        trouble = f"{len(made_up)} missing or of another shape, such as {made_up[0]}"
        refuse(f"the weights in {path!r} do not fit its config.json ({trouble}): copy or download it again")
    if report["unexpected_keys"]:
        first, n = min(report["unexpected_keys"]), len(report["unexpected_keys"])
        why = f"has no place for {n} of its weights, such as {first}: they are another model's"
        refuse(f"config.json in {path!r} {why}")
    model = model.to(device_here()).requires_grad_(False).eval()
    if model.device.type == "cpu" and model.num_parameters() < 10e6:
        torch.set_num_threads(1)  # threads cost tiny matrices more than they give; on a busy machine ten times as much
    return cast(model, faster_precision(model)) if precision == "auto" else model


def load_config(path, role):
    if os.path.exists(os.path.join(path, "adapter_config.json")):
        refuse(f"--{role} {path!r} is an adapter (LoRA): merge it by peft's merge_and_unload, and save the whole model")
    config = _load(transformers.AutoConfig, path, role)
    if getattr(config, "quantization_config", None):
        refuse(f"--{role} {path!r} is quantised, which can be neither trained nor compared here: take the full weights")
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        refuse(f"--{role} {path!r} is a {config.model_type} model: give a causal language model")
    return config


def _load(auto_class, path, role, **options):
    """auto_class.from_pretrained, which explains itself at length, and makes an empty tokenizer where there is none:
    refused here in one line."""
    where = "is no folder here, and cannot be had from the hub by this name"
    if os.path.isdir(path):
        where, names = "is damaged or incomplete, so copy or download it again", " ".join(os.listdir(path))
        parts = {"config.json": r"\bconfig\.json", "tokenizer": "tokenizer|vocab", "weights": r"\.safetensors|\.bin"}
        missing = [part for part, pattern in parts.items() if not re.search(pattern, names)]
        if missing:
            refuse(f"the {role} {path!r} has no {missing[0]}: save model and tokenizer there with save_pretrained")
    try:
        return auto_class.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # the hub, the file system, the format: transformers raises them all
        reason = f"{type(error).__name__}: {error}"[:300]
        refuse(f"the {role} {path!r} {where} ({auto_class.__name__}: {reason})")


def identity(path):
    """What tells one state of a checkpoint from another: a hash of its files' sizes and times, or the hub's commit."""
    if path and os.path.isdir(path):
        stats = [(name, os.stat(os.path.join(path, name))) for name in sorted(os.listdir(path))]
        text = repr([(name, stat.st_size, stat.st_mtime) for name, stat in stats])
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    return path and getattr(load_config(path, "model"), "_commit_hash", None)


def can_be_compiled(model):
    """Whether a decode step can be compiled once and for all: the cache of a sliding window counts in Python, and each
    number would compile anew."""
    layers_of_cache = transformers.StaticCache(config=model.config, max_cache_len=8).layers
    torch._dynamo.config.recompile_limit = 64  # shapes of a curriculum, of evaluation and gate; 8 by default
    return getattr(model, "_can_compile_fullgraph", False) and not any(layer.is_sliding for layer in layers_of_cache)


def static_cache(model, rows, columns):
    """A cache of this size, emptied; the same one every time, since a recorded step holds its addresses."""
    caches = model.__dict__.setdefault("static_caches", {})
    if (rows, columns) not in caches:
        if len(caches) == 3:  # rollouts, evaluation, a gate: what else there was, a curriculum has outgrown
            del caches[next(iter(caches))]
        caches[rows, columns] = transformers.StaticCache(config=model.config, max_cache_len=columns)
    caches[rows, columns].reset()
    return caches[rows, columns]


def sequence_flops(model, response_lens, prompt_lens):
    """Model FLOPs of one forward pass over prompts and their responses, with the LM head at the responses only.

    (B,), (B,) -> float. Two per weight of a matrix and token, plus attention: a token sees n others through
    4·n·heads·head_dim FLOPs per layer (scores and values). The last token is predicted but never read. Sampling with a
    KV cache does the same arithmetic as one such pass, and a backward pass twice as much. Padding is not counted."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    embeddings = {id(head), id(model.get_input_embeddings().weight)}
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    used = {2: 1.0, 3: getattr(config, "num_experts_per_tok", experts) / experts}  # experts are stacked, few are used
    matrices = sum(p.numel() * used[p.ndim] for p in model.parameters() if p.ndim in used and id(p) not in embeddings)
    layer_configs = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
    head_dims = [getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads for c in layer_configs]
    width = sum(c.num_attention_heads * head_dim for c, head_dim in zip(layer_configs, head_dims))
    n = (prompt_lens + response_lens - 1).double()
    attention = 4 * n * (n + 1) / 2 * width  # causal: token i attends to i tokens
    return (2 * matrices * n + attention + 2 * head.numel() * response_lens.double()).sum().item()
