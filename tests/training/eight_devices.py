"""Three steps of the tiny experiment on eight devices, for each mesh given: prints [[[loss, gradient norm], ...], ...]."""

import dataclasses
import json
import sys

from training_runs import TINY

from deltajax import data
from deltajax.training import loop
from deltajax.training.config import Mesh, load_config

config = load_config(TINY)
dataset = data.load(config.data)
runs = []
for sizes in json.loads(sys.argv[1]):
    step = loop.make_step(dataclasses.replace(config, mesh=Mesh(**sizes)))
    iterator, state, rows = dataset.train_iterator(), step.init(config.seed), []
    for _ in range(3):
        state, metrics = step.train(state, step.put(next(iterator)))
        rows.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    runs.append(rows)
print(json.dumps(runs))
