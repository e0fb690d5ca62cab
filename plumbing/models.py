"""Checkpoints: what can be known without weights is checked first; models are loaded in the precision asked for."""

import dataclasses
import functools
import math
import os
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
import transformers
from torch.utils.checkpoint import checkpoint

from plumbing.fast import check_logits
from plumbing.processes import device_here, is_main, layers, shard
from plumbing.tasks import encode_prompts, refuse


@dataclass(eq=False)
class Vocab:
    """What the two models must agree on before their distributions can be compared."""

    size: int  # logits in use
    end_ids: tuple[int, ...]  # the end tokens of both models: a rollout stops at any of them
    pad_id: int  # fills what the masks exclude; may well be an end token


def load_vocab(args, problem_sets):
    """Load the tokenizers and configs of the models that args names (student and teacher, student, or model), encode
    the prompts of all problem sets, and refuse what cannot work. -> Vocab, the student's tokenizer with the teacher's
    chat template: the template serves both."""
    paths = {role: getattr(args, role) for role in ("student", "teacher", "model") if hasattr(args, role)}
    configs = {role: _load_config(path, role).get_text_config() for role, path in paths.items()}
    tokenizers = {role: _load(transformers.AutoTokenizer, path, role) for role, path in paths.items()}
    student = next(iter(tokenizers.values()))
    asker = tokenizers.get("teacher", student)
    for problems in problem_sets:
        encode_prompts(problems, asker, args.thinking, args.instruction)
        _check_known(problems, asker)
    added = {t for tok in tokenizers.values() for t in tok.get_added_vocab()}  # their roles may differ
    if "teacher" in paths:
        ids, ids_of_teacher = ({t: i for t, i in tok.get_vocab().items() if t not in added} for tok in (student, asker))
        if ids != ids_of_teacher:
            refuse("the tokenizers of student and teacher give tokens different ids: choose both from one family")
        student.chat_template = asker.chat_template
        probes = [dataclasses.replace(p) for p in problem_sets[0][:256]]
        encode_prompts(probes, student, args.thinking, args.instruction)
        if any(a.prompt != b.prompt for a, b in zip(probes, problem_sets[0])):
            refuse("--student and --teacher tokenize the same prompt differently: choose both from one family")
    sizes = {role: config.vocab_size for role, config in configs.items()}
    of_texts = (i for tok in tokenizers.values() for t, i in tok.get_vocab().items() if t not in added)
    needed = max(max(of_texts), *(max(p.prompt) for problems in problem_sets for p in problems)) + 1
    size = min(sizes.values())
    if needed > size:  # (Gemma 3's tokenizer has one more token, for images, than its small models)
        refuse(
            f"the tokenizer has ids up to {needed - 1}, but the vocabulary sizes in config.json are {sizes}: the "
            "tokenizer is another model's, or model.resize_token_embeddings was forgotten"
        )
    if len(set(sizes.values())) > 1:
        size = min(size, max(max(tok.get_vocab().values()) + 1 for tok in tokenizers.values()))
        if is_main():
            print(f"vocabulary sizes are {sizes}: logits cropped to the tokenizer's {size}")
    end_ids = set()
    for role, path in paths.items():
        for ids in (configs[role].eos_token_id, _generation_end(path), tokenizers[role].eos_token_id):
            end_ids.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    end_ids = tuple(sorted(i for i in end_ids if 0 <= i < size))
    if not end_ids:
        refuse(f"no response could ever end: set an end token, eos_token_id below {size}, in a model's config.json")
    _check_room(args, configs, problem_sets)
    return Vocab(size, end_ids, end_ids[0] if student.pad_token_id is None else student.pad_token_id), student


def _check_known(problems, tokenizer):
    """Refuse questions that the tokenizer has no words for: a model learns nothing from them, without complaint."""
    unk = tokenizer.unk_token_id  # (looked up anew at every access)
    unknown = [p.prompt.count(unk) / len(p.prompt) for p in problems]
    share = sum(unknown) / len(unknown)
    if share > 0.05:
        example = problems[unknown.index(max(unknown))].question[:60]
        refuse(
            f"{share:.0%} of the prompts' tokens are unknown to the tokenizer of {tokenizer.name_or_path!r}, as in "
            f"{example!r}: models and data do not belong together"
        )


def _check_room(args, configs, problem_sets):
    """Prompts and responses must fit into both models' contexts."""
    longest = max((p for problems in problem_sets for p in problems), key=lambda p: len(p.prompt))
    new = max(getattr(args, "max_new_tokens", 0), args.eval_max_new_tokens)
    for role, config in configs.items():
        room = getattr(config, "max_position_embeddings", None) or math.inf
        if len(longest.prompt) + new > room:
            refuse(
                f"the longest prompt has {len(longest.prompt)} tokens; with {new} new ones it exceeds the {role}'s "
                f"context of {room}: lower --max_new_tokens and --eval_max_new_tokens or leave out "
                f"{longest.question[:60]!r}..."
            )


def _generation_end(path):
    """The end tokens in a checkpoint's generation_config.json, of which nothing else is used."""
    try:
        return transformers.GenerationConfig.from_pretrained(path).eos_token_id
    except Exception as error:  # most often there is none, which is fine
        if os.path.exists(os.path.join(path, "generation_config.json")):
            refuse(f"generation_config.json in {path!r} is damaged: mend or delete it ({error})")


def resolve_precision(args):
    """What --precision auto stands for here: bf16 on a GPU that computes in it; on a CPU for models of more than 10
    million parameters, if it has AMX (without it, products in bf16 were slower than in fp32: bench/README.md)."""
    if args.precision != "auto":
        return args.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    role = "student" if hasattr(args, "student") else "model"
    fast = torch.cpu._is_amx_tile_supported() and not is_toy(_load_config(getattr(args, role), role))
    return "bf16" if fast else "fp32"


def is_toy(config):
    """Whether a model of this config has less than 10 million parameters."""
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config).num_parameters() < 10e6
    except Exception:  # none can be made of it: load_vocab and load_model say what is wrong
        return True


def load_model(path, args, trainable=False):
    """A causal LM on this process's device: the trained one with fp32 weights, which small learning rates need."""
    dtype = torch.bfloat16 if args.precision == "bf16" and not trainable else torch.float32
    device = device_here() if trainable else getattr(args, "teacher_device", "") or device_here()
    options = dict(dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    model, report = _load(transformers.AutoModelForCausalLM, path, "model", **options)
    made_up = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    if made_up:
        trouble = f"{len(made_up)} missing or of another shape, such as {made_up[0]}"
        refuse(f"the weights in {path!r} do not fit its config.json ({trouble}): copy or download it again")
    model.to(device)
    if trainable and model.num_parameters() > 10e6 and is_main():
        defaults = [name for name in ("data", "eval_data", "lr") if getattr(args, name) == getattr(type(args), name)]
        if defaults:
            values = ", ".join(f"--{name} {getattr(args, name)}" for name in defaults)
            print(f"warning: {values}: made for the toy; others take an lr of 5e-7 to 2e-6, begin from recipes/")
    if model.device.type == "cpu" and model.num_parameters() < 10e6:
        torch.set_num_threads(1)  # threads cost tiny matrices more than they give; on a busy machine ten times as much
    model.requires_grad_(trainable).eval()  # eval mode always: dropout would make sampler and scorer disagree
    model.autocasts = args.precision == "bf16" and trainable  # see fast.autocast
    check_logits(model, Vocab(model.config.get_text_config().vocab_size, (), 0))
    if trainable and args.gradient_checkpointing:
        for layer in layers(model):  # transformers' own switch needs train mode, and with it dropout
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return shard(model) if dist.is_initialized() else model


def _load_config(path, role):
    config = _load(transformers.AutoConfig, path, role)
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
        return auto_class.from_pretrained(path, **options)
    except Exception as error:  # the hub, the file system, the format: transformers raises them all
        reason = f"{type(error).__name__}: {error}"[:300]
        refuse(f"the {role} {path!r} {where} ({auto_class.__name__}: {reason})")
