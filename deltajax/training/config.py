"""What a run is: one frozen, checked dataclass. An experiment file builds it in `get_config()`."""

import dataclasses
import hashlib
import math
import re
from pathlib import Path
from typing import Any, Literal

from deltajax import data as data_lib
from deltajax.errors import check_types
from deltajax.models import registry
from deltajax.training import serialize
from deltajax.training.experiment_file import call, load_experiment


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise the one-line ValueError that every config check raises."""
    if not condition:
        raise ValueError(f"{key} must be {allowed}, got {value!r}")


def _require_all(config: Any, allowed: str, accept: Any, *keys: str) -> None:
    for key in keys:
        require(accept(getattr(config, key)), key, getattr(config, key), allowed)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW, or Muon for the weight matrices and AdamW for everything else, or stochastic gradient descent.

    Attributes:
      name: "adamw" (arXiv 1711.05101), "muon" (arXiv 2502.16982; its update scale suits AdamW's rates) or "sgd".
      learning_rate: the schedule's peak.
      weight_decay: multiplied by the learning rate; parameters whose spec says `weight_decay=False` are exempt.
      b1, b2, eps: Adam's moments.
      momentum: Muon's (Nesterov's) and that of "sgd" (heavy ball).
      clip_norm: largest global gradient norm; None: no clipping.
      trainable: paths of the parameters that are trained, each with all below it ("network.head"); (): all. The others stay
        as they are, cost no gradient and have no moments. Their batch norms go on as in training. A run keeps to it, as its
        moments do; others begin from it (`init_from`).
    """

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    clip_norm: float | None = 1.0
    trainable: tuple[str, ...] = ()

    def __post_init__(self):
        """Check types and ranges."""
        check_types(self)
        _require_all(self, "> 0 and finite", lambda x: 0 < x < math.inf, "learning_rate", "eps")
        _require_all(self, ">= 0 and finite", lambda x: 0 <= x < math.inf, "weight_decay")
        _require_all(self, "in [0, 1)", lambda x: 0 <= x < 1, "b1", "b2", "momentum")
        require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", self.clip_norm, "> 0 or none")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate over the run: linear warm-up, a plateau, a decay to `final_fraction` of the peak at the last step.

    Attributes:
      decay: shape of the decay; "constant" never decays.
      warmup_steps: updates until the peak is reached.
      decay_steps: length of the decay at the end of the run, the plateau before it (warmup-stable-decay,
        arXiv 2404.06395); None: decay begins when warm-up ends.
      final_fraction: last learning rate over peak, in [0, 1].
    """

    decay: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 100
    decay_steps: int | None = None
    final_fraction: float = 0.1

    def __post_init__(self):
        """Check types and ranges."""
        check_types(self)
        _require_all(self, ">= 0", lambda x: x >= 0, "warmup_steps")
        require(self.decay_steps is None or self.decay_steps > 0, "decay_steps", self.decay_steps, "> 0 or none")
        _require_all(self, "in [0, 1]", lambda x: 0 <= x <= 1, "final_fraction")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the device mesh's axes; at most one is -1: all the devices that remain.

    Attributes:
      data: each device has sequences of its own. On several slices this axis goes across them.
      fsdp: the same, and each holds a part of the parameters and of the optimiser's state.
      sequence: each device has a part of every sequence's tokens (language models).
      tensor: each device has a part of the heads, hidden units and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self):
        """Check types and ranges."""
        check_types(self)
        names = [field.name for field in dataclasses.fields(self)]
        _require_all(self, ">= 1 or -1", lambda x: x == -1 or x >= 1, *names)
        sizes = dataclasses.astuple(self)
        require(sizes.count(-1) <= 1, f"({', '.join(names)})", sizes, "at most one -1")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When to save (also at the last step, at each best validation loss and when interrupted) and how many to keep."""

    every: int = 500
    keep: int = 2

    def __post_init__(self):
        """Check types and ranges."""
        check_types(self)
        _require_all(self, ">= 1", lambda x: x >= 1, "every", "keep")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """When to evaluate (also at the last step) and on how many validation batches; None: all of them."""

    every: int = 500
    batches: int | None = None

    def __post_init__(self):
        """Check types and ranges."""
        check_types(self)
        _require_all(self, ">= 1", lambda x: x >= 1, "every")
        require(self.batches is None or self.batches >= 1, "batches", self.batches, ">= 1 or none")


@dataclasses.dataclass(frozen=True)
class Probes:
    """Statistics of every block's residual output, read off training steps into `activations.csv`.

    Attributes:
      every: after steps 0, 1, 2, 4, 8 ... and then all multiples of this (Pythia's checkpoints: 1000); None: never.
      sequences: of the batch (of each microbatch) that are looked at, the first ones.
    """

    every: int | None = None
    sequences: int = 10

    def __post_init__(self):
        """Check types and ranges."""
        check_types(self)
        require(self.every is None or self.every >= 1, "every", self.every, ">= 1 or none")
        _require_all(self, ">= 1", lambda x: x >= 1, "sequences")

    def due(self, step: int) -> bool:
        """Whether the activations of the parameters after `step` updates are wanted."""
        return self.every is not None and (step % self.every == 0 or (step < self.every and step & (step - 1) == 0))


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """A loss or gradient norm that is not finite, or a spike, skips the update.

    Attributes:
      max_consecutive, max_total: the run aborts after more skips than these.
      max_grad_norm: a larger gradient norm is a spike; None: none is.
    """

    max_consecutive: int = 10
    max_total: int = 100
    max_grad_norm: float | None = None

    def __post_init__(self):
        """Check types and ranges."""
        check_types(self)
        _require_all(self, ">= 0", lambda x: x >= 0, "max_consecutive", "max_total")
        norm = self.max_grad_norm
        require(norm is None or norm > 0, "max_grad_norm", norm, "> 0 or none")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from the logits.

    Attributes:
      max_tokens: tokens to draw.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens; None: all.
      top_p: only the smallest set of tokens with at least this probability (nucleus, arXiv 1904.09751).
    """

    max_tokens: int = 256
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95

    def __post_init__(self):
        """Check types and ranges."""
        check_types(self)
        _require_all(self, ">= 1", lambda x: x >= 1, "max_tokens")
        _require_all(self, ">= 0 and finite", lambda x: 0 <= x < math.inf, "temperature")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, ">= 1 or none")
        _require_all(self, "in (0, 1]", lambda x: 0 < x <= 1, "top_p")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run.

    Attributes:
      model, data: what is trained on what.
      steps: batches to consume; a batch whose update was skipped counts.
      seed: of the initial parameters and the final sample (the data have their own).
      grad_accumulation: microbatches per step; memory falls, the update stays the same.
      log_every: steps between rows of metrics.
      init_from: folder of an earlier run, whose last parameters and statistics replace the initial ones wherever paths and
        shapes agree (the rest is new, such as the steps of delta activations); or a .safetensors file with torchvision's or
        timm's weights of the network, all but its head; "": none.
      prompt: beginning of the sample written when the run ends.
    """

    model: Any  # a type of models.registry.MODELS
    data: Any  # a type of data.LOADERS
    steps: int
    seed: int = 0
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    mesh: Mesh = Mesh()
    grad_accumulation: int = 1
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    nonfinite: NonFinite = NonFinite()
    probes: Probes = Probes()
    log_every: int = 10
    init_from: str = ""
    prompt: str = ""
    sampling: Sampling = Sampling()

    def __post_init__(self):
        """Check types, ranges and what the parts must agree on."""
        check_types(self)
        registry.module_of(self.model)
        data_lib.loader_of(self.data)
        _require_all(self, "in [1, 2**31)", lambda x: 1 <= x < 2**31, "steps", "grad_accumulation", "log_every")
        _require_all(self, "in [0, 2**32)", lambda x: 0 <= x < 2**32, "seed")
        warmup = self.schedule.warmup_steps
        require(warmup < self.steps, "schedule.warmup_steps", warmup, f"< steps = {self.steps}")
        decay = self.schedule.decay_steps
        longest = self.steps - warmup
        require(
            decay is None or decay <= longest, "schedule.decay_steps", decay, f"<= steps - warmup_steps = {longest}"
        )


def load_config(path: str) -> TrainConfig:
    """What `get_config` of an experiment file returns.

    Args:
      path: the file's, or with arguments of its get_config: "experiments/parity.py:size=paper,beta_max=1".

    Raises:
      ValueError: no such file, an error while it runs, no `get_config`, arguments that it does not take, or that it
        returns something else.
    """
    file, arguments = split_arguments(path)
    config = call(load_experiment(file), "get_config", arguments, path)
    if not isinstance(config, TrainConfig):
        raise ValueError(f"--config={path}: get_config() must return a TrainConfig, got {type(config).__name__}")
    try:
        same = serialize.from_json(serialize.to_json(config)) == config
    except ValueError as error:
        raise ValueError(f"--config={path}: could not be read back from a checkpoint: {error}") from None
    if not same:
        raise ValueError(f"--config={path}: would not be the same when read back from a checkpoint")
    return config


def split_arguments(path: str) -> tuple[str, dict[str, str]]:
    """The file, and the arguments of "file.py:a=1,b=2". A comma that no name follows belongs to the value before it."""
    file, colon, text = path.partition(".py:")
    pairs = re.split(r",\s*(?=[A-Za-z_]\w*=)", text) if text else []
    for pair in pairs:
        if not re.match(r"[A-Za-z_]\w*=", pair):
            raise ValueError(
                f"--config={path}: after the file's name there must be name=value,name=value, got {pair!r}"
            )
    return file + ".py" * bool(colon), dict(pair.split("=", 1) for pair in pairs)


def default_workdir(path: str) -> Path:
    """`runs/<name of the file>`, with the arguments if there are any.

    Raises:
      ValueError: only the folder is there that an older deltajax would have used, for this run or for another one.
    """
    file, arguments = split_arguments(path)
    given = [f"{k}={v}" for k, v in arguments.items()]
    workdir, older = (Path("runs") / "-".join([Path(file).stem, *map(f, given)]) for f in (folder_name, slug))
    if workdir != older and older.is_dir() and not workdir.is_dir():
        raise ValueError(
            f"--workdir: {older} may hold this run or one whose arguments look alike there; "
            f"choose --workdir={older} to continue it or --workdir={workdir} to begin"
        )
    return workdir


def folder_name(text: str) -> str:
    """A name for a folder that no other text has: that of `slug`, and a digest where it loses something."""
    short = slug(text)[:200]
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    return short if short == text else f"{short}-{digest[:8]}"


def slug(text: str) -> str:
    """`text` with what does not belong into a file's name replaced."""
    return re.sub(r"[^A-Za-z0-9=.,_+-]+", "_", text).strip("_")
