"""Three steps of the tiny experiment on eight devices in several layouts: prints {layout: [[loss, gradient norm], ...]}."""

import dataclasses
import json

from training_runs import TINY

from deltajax import data
from deltajax.train import load_config
from deltajax.training import loop
from deltajax.training.config import Mesh

config = load_config(TINY)
dataset = data.load(config.data)
results = {}
for mesh in (Mesh(data=8), Mesh(data=1, fsdp=8), Mesh(data=2, fsdp=2, tensor=2)):
    step = loop.make_step(dataclasses.replace(config, mesh=mesh))
    iterator, state, rows = dataset.train_iterator(), step.init(config.seed), []
    for _ in range(3):
        state, metrics = step.train(state, step.put(next(iterator)))
        rows.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    results[str(mesh)] = rows
print(json.dumps(results))
