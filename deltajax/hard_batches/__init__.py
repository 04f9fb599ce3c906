"""Which examples the next update learns from: learning from hard batches (arXiv 2304.03486), its control and its rivals.

Every policy is a frozen config whose methods are pure functions of a state, a dict of arrays that can be saved. Those of whole
batches (`batches`) plug into any loop, of any framework; this one fits a line to 10 batches by E N = 50 updates:

    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(10, 8, 2))
    >>> y = x @ [1.0, -2.0]
    >>> w, policy = np.zeros(2), HardBatches(delta=0.3)
    >>> state = policy.init(num_batches=10)
    >>> for _ in range(5 * 10):
    ...     i = int(policy.next(state))
    ...     error = x[i] @ w - y[i]
    ...     state = policy.update(state, i, np.mean(error**2))  # the loss before the update
    ...     w -= 0.1 * x[i].T @ error / 8
    >>> w.round(1).tolist()
    [1.0, -2.0]

Those of single examples (`examples`) ask for losses with a `Draw`:

    >>> policy = SelectiveBackprop(beta=1.0)
    >>> x, y = x.reshape(80, 2), y.reshape(80)
    >>> w, state = np.zeros(2), policy.init(num_examples=80, batch_size=8, updates=50)
    >>> updates = 0
    >>> while updates < 50:
    ...     for draw in policy.upcoming(state):
    ...         error = x[draw.examples] @ w - y[draw.examples]
    ...         state = policy.update(state, draw, error**2)
    ...         if not draw.scored:
    ...             w -= 0.1 * x[draw.examples].T @ error / 8
    ...             updates += 1
    >>> w.round(1).tolist()
    [1.0, -2.0]

Nothing here knows a model, a trainer or a loader, so the data floor may import it.
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
