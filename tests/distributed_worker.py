"""Started by test_distributed.py under torchrun: run scripts, one after the other, in one process group.

python distributed_worker.py JSON, a list of [script, arguments]. With "sgd" among the arguments the optimizer is
plain SGD: AdamW turns a difference of 5e-9 in a gradient into one of 3e-5 in a weight, SGD keeps it what it is.
"""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

import runs

torch.set_num_threads(1)
adamw = torch.optim.AdamW
for script, arguments in json.loads(sys.argv[1]):
    sgd = arguments.pop("sgd", False)
    torch.optim.AdamW = (lambda params, lr, weight_decay: torch.optim.SGD(params, lr=lr)) if sgd else adamw
    module = importlib.import_module(script)
    argv = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    module.main(runs.parse(module.Args, argv))
if dist.is_initialized():
    dist.destroy_process_group()
