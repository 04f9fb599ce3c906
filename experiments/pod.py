"""The paper's language models on a TPU pod slice: what `python -m deltajax.rehearse` rehearses.

Claim: the published sizes (arXiv 2406.06484, section 4; sequences of 2,048 tokens) fit the pods in
  `benchmarks/results/rehearsal.csv`.
Command: python -m deltajax.rehearse
  --config=experiments/pod.py:model=deltanet-1.3b,batch_size=512 --topology=v5p:8x8x8;
  on the pod's hosts `python -m deltajax.train` with the same --config.
Time: about a minute of one CPU core to rehearse; training is unmeasured.
Result: benchmarks/results/rehearsal.csv. The default corpus is a placeholder: a real run names its
  own with --config.data.corpus.
"""

from deltajax import data
from deltajax.models import named
from deltajax.training.config import Mesh, Optimizer, Schedule, TrainConfig


def get_config(model: str = "deltanet-340m", batch_size: int = 256, fsdp: int = 16, sequence: int = 1) -> TrainConfig:
    """A named model; batch_size: sequences; fsdp, sequence: devices on these axes, all others on data."""
    return TrainConfig(
        model=named.get(model),
        data=data.Config(corpus="stdlib", seq_len=2048, batch_size=batch_size),
        steps=28_000,
        optimizer=Optimizer(learning_rate=3e-4, weight_decay=0.01),
        schedule=Schedule(warmup_steps=1000),
        mesh=Mesh(data=-1, fsdp=fsdp, sequence=sequence),
    )
