"""Started by test_distributed.py in several processes: run scripts, one after the other, in one process group.

python distributed_worker.py JSON, a list of [script, arguments]. With "sgd" among the arguments the optimizer is
plain SGD: AdamW turns a difference of 5e-9 in a gradient into one of 3e-5 in a weight, SGD keeps it what it is.
With SICK_AT=n in the environment, process 1 fails when it begins to sample for step n.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import runs

torch.set_num_threads(1)
adamw = torch.optim.AdamW
for script, arguments in json.loads(sys.argv[1]):
    module = importlib.import_module(script)
    torch.optim.AdamW = (
        (lambda params, lr, weight_decay: torch.optim.SGD(params, lr=lr)) if arguments.pop("sgd", 0) else adamw
    )
    if "SICK_AT" in os.environ:
        healthy = module.sample

        def sample(model, prompts, keys, *args, healthy=healthy, **kwargs):
            if keys[0][1] == int(os.environ["SICK_AT"]) and runs.rank_and_world()[0] == 1:
                raise RuntimeError("process 1 is ill")
            return healthy(model, prompts, keys, *args, **kwargs)

        module.sample = sample
    argv = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    module.main(runs.parse(module.Args, argv))
