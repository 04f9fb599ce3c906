"""Three steps of the tiny experiment on eight devices, every mesh axis in use: prints [[loss, gradient norm], ...]."""

import dataclasses
import json

from training_runs import TINY

from deltajax import data
from deltajax.training import loop
from deltajax.training.config import Mesh, load_config

config = load_config(TINY)
dataset = data.load(config.data)
step = loop.make_step(dataclasses.replace(config, mesh=Mesh(data=2, fsdp=2, tensor=2)))
iterator, state, rows = dataset.train_iterator(), step.init(config.seed), []
for _ in range(3):
    state, metrics = step.train(state, step.put(next(iterator)))
    rows.append([float(metrics["loss"]), float(metrics["grad_norm"])])
print(json.dumps(rows))
