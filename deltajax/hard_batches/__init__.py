"""Which examples the next update learns from: learning from hard batches (arXiv 2304.03486), its control and its rivals.

Every policy is a frozen config whose methods are pure functions of a state, a dict of arrays. Those of whole batches
(`batches`) plug into any loop:

    policy = HardBatches(delta=0.5)
    state = policy.init(num_batches)
    for _ in range(epochs * num_batches):
        index = policy.next(state)
        loss = train_on(batches[index])             # the loss before the update
        state = policy.update(state, index, loss)

Those of single examples (`examples`) ask for losses with a `Draw`; `data.selection` shows the loop. Nothing here knows a model, a
trainer or a loader, so the data floor may import it.
"""

from deltajax.hard_batches.batches import BatchPolicy, EasyBatches, HardBatches, InOrder, RandomBatches
from deltajax.hard_batches.examples import Draw, ExamplePolicy, InfoBatch, RhoLoss, SelectiveBackprop, Shuffled

Selection = (
    Shuffled | InOrder | HardBatches | EasyBatches | RandomBatches | SelectiveBackprop | InfoBatch | RhoLoss
)  # by their names in lower case: shuffled, in_order, hard_batches, ...

__all__ = [
    "BatchPolicy",
    "Draw",
    "EasyBatches",
    "ExamplePolicy",
    "HardBatches",
    "InOrder",
    "InfoBatch",
    "RandomBatches",
    "RhoLoss",
    "Selection",
    "SelectiveBackprop",
    "Shuffled",
]
