"""Shared fixtures: tiny checkpoints of real architectures, made here so that the suite needs no network."""

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asked the network would wait for it

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the models are tiny: threads would only get in each other's way

import plumbing.run  # noqa: E402
from common import make_rollouts  # noqa: E402
from plumbing.arguments import parse  # noqa: E402

# Drawing takes longer than all else in runs of this size. What looks at curves.png asks for the fixture `curves`.
draw_curves, plumbing.run.draw_curves = plumbing.run.draw_curves, lambda out: None

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QUESTIONS = [
    "Tom has 3 apples and buys 4 more. How many?",
    "What is 12 divided by 4?",
    "Add 2, 5 and 1.",
    "Is 7 prime?",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(eos, corpus=(), vocab_size=300):
    """A byte-level BPE tokenizer as Qwen's: special tokens last, ChatML template with a thinking switch."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=sorted(alphabet), show_progress=False)
    tok.train_from_iterator([*QUESTIONS, *corpus], trainer)
    tok.add_special_tokens(SPECIAL)  # the same ids whichever of them is the eos
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=eos, pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast


def make_checkpoint(
    path, arch="Qwen3", tied=True, eos="<|im_end|>", padded=0, hidden=32, layers=2, seed=0, tokenizer=None, **config
):
    """Save a tiny random causal LM and its tokenizer under path -> str(path). padded: extra embedding rows."""
    tokenizer = tokenizer or make_tokenizer(eos)
    torch.manual_seed(seed)
    options = (
        dict(
            vocab_size=len(tokenizer) + padded,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.3,  # distributions with shape: near-uniform ones would hide a swapped direction
        )
        | config
    )
    if arch == "Qwen3":
        options.setdefault("head_dim", hidden // 4)
    model = getattr(transformers, f"{arch}ForCausalLM")(getattr(transformers, f"{arch}Config")(**options))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


# Every script with a training loop, found and not listed: a new sibling is tested as soon as it stands there.
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if "optimizer.step()" in path.read_text(encoding="utf-8"))
DISTILLATION = [
    script for script in SCRIPTS if "distillation_loss(" in (ROOT / f"{script}.py").read_text(encoding="utf-8")
]


def arguments_of(script, world, **more):
    """The world's arguments, as far as the script has them, with what makes it quick."""
    fields = {field.name for field in dataclasses.fields(importlib.import_module(script).Args)}
    quick = dict(lengths="2,4,6", h_min=0, held_out=2, group_size=2)
    return {name: value for name, value in (quick | world | more).items() if name in fields}


def run(script, **arguments):
    """Run a script in process, as its command line would."""
    module = importlib.import_module(script)
    return module.main(parse(module.Args, argv(arguments)))


def argv(arguments):
    return [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


def even_length(text, answer):
    """A reward that random models get now and then, so that GRPO has something to reinforce."""
    return len(text) % 2 == 0


def rollouts_of(prompts, responses):
    """Rollouts of these lists of ids, on the CPU, all of which finish."""
    return make_rollouts(prompts, responses, [True] * len(prompts), torch.device("cpu"))


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_log(out_dir, times=False):
    """log.jsonl as a list of dicts, without what depends on the clock."""
    rows = [json.loads(line) for line in Path(out_dir, "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows if times else [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")} for r in rows]


@pytest.fixture
def curves(monkeypatch):
    monkeypatch.setattr(plumbing.run, "draw_curves", draw_curves)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A directory with a student, a teacher and a data set; -> arguments that make any script run on them quickly.

    The teacher has two dozen end tokens, so that random models end too, and responses differ in length.
    """
    root = tmp_path_factory.mktemp("world")
    words = "The answer is here and it is right because we have added all of it".split()
    rows = [
        {"question": f"{q} ({i})", "answer": f"work <<1+1=2>>\n#### {i}", "response": " ".join(words[: 1 + i])}
        for i, q in enumerate(QUESTIONS * 3)
    ]
    return dict(
        student=make_checkpoint(root / "student", eos="<|endoftext|>", seed=1),
        teacher=make_checkpoint(root / "teacher", hidden=48, seed=2, eos_token_id=[302, *range(100, 124)]),
        data=write_jsonl(root / "train.jsonl", rows),
        eval_data=write_jsonl(root / "eval.jsonl", rows[:3]),
        steps=3, batch_size=4, micro_batch_size=3, max_new_tokens=6, eval_max_new_tokens=6, eval_k=2, lr=1e-3,
    )  # fmt: skip
