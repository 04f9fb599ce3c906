"""The delta activation as a layer: learned steps, what it puts out, and the state that persists from call to call."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from deltajax.errors import check_number, check_types
from deltajax.fields import CHANGEABLE
from deltajax.layers.param import ParamSpec, init_params
from deltajax.ops import delta_activation as ops

Output = Literal["quantized", "delta", "delta_only"]


@dataclasses.dataclass(frozen=True)
class Config:
    """A delta activation.

    Attributes:
      steps: one step per "channel" (the last axis), per "layer" or per "neuron".
      init_step: of every step at the start, > 0. After training without delta activations a start far below the
        activations' size changes little; refinement raises it.
      step_gradient: see `ops.delta_activation.quantize`.
    """

    steps: Literal["channel", "layer", "neuron"] = "channel"
    init_step: float = 0.1
    step_gradient: ops.StepGradient = dataclasses.field(default="raise", metadata=CHANGEABLE)

    def __post_init__(self):
        """Check ranges."""
        check_types(self)
        check_number(self, "init_step", 0)


def param_specs(config: Config, shape: tuple[int, ...]) -> dict[str, ParamSpec]:
    """{"step"}; `shape` is that of one frame's activations, channels last."""
    of_step = {"channel": shape[-1:], "layer": (), "neuron": shape}[config.steps]
    init = jax.nn.initializers.constant(config.init_step)
    return {"step": ParamSpec(of_step, (None,) * len(of_step), init, weight_decay=False)}


def init(key: PRNGKeyArray, config: Config, shape: tuple[int, ...]) -> dict:
    """Parameters drawn from `param_specs`."""
    return init_params(key, param_specs(config, shape))


def init_state(batch: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> dict:
    """State before the first frame, also what a reset returns to: the last O, and the running sum of what came in, are 0."""
    return {"previous": jnp.zeros((batch, *shape), dtype), "sum": jnp.zeros((batch, *shape), dtype)}


def apply(
    params: dict,
    config: Config,
    z: Float[Array, "B T *D"],
    *,
    output: Output = "quantized",
    state: dict | None = None,
) -> tuple[Float[Array, "B T_out *D"], dict | None]:
    """Quantise activations; put out their values or their changes.

    Args:
      params: from `init`.
      config: static under jit.
      z: activations of T frames.
      output: "quantized" is O_t (training, and exact inference); "delta" is O_t of the first frame, then D_t, whose running
        sum is O; "delta_only" is D_t, without the first frame (T - 1 frames) unless a state says what was before it.
      state: from `init_state` or an earlier call; with it all deltas are relative to the last frame of that call.

    Returns:
      The output, and the new state (None without one).
    """
    o = ops.quantize(z, params["step"], config.step_gradient)
    new_state = None if state is None else {**state, "previous": o[:, -1].astype(state["previous"].dtype)}
    if output == "quantized":
        return o, new_state
    if output not in ("delta", "delta_only"):
        raise ValueError(f"output must be one of quantized, delta, delta_only, got {output!r}")
    if state is not None:
        return ops.differences(o, state["previous"]), new_state
    d = ops.differences(o)
    return (d if output == "delta_only" else jnp.concatenate([o[:, :1], d], axis=1)), None


def accumulate(
    params: dict,
    config: Config,
    y: Float[Array, "B T *D"],
    bias: Float[Array, "*D"] | float,
    state: dict,
    activation: Any = jax.nn.relu,
) -> tuple[Float[Array, "B T *D"], dict]:
    """Delta inference after a linear map without bias that was given deltas: deltas in, deltas out.

    Z_t = activation(sum of y up to t + bias): a bias belongs to the sum, not to its increments, so the map in front leaves
    it to this layer. The state persists over calls; `init_state` resets it.
    """
    total = state["sum"][:, None] + jnp.cumsum(y.astype(state["sum"].dtype), axis=1)
    out, new_state = apply(params, config, activation(total + bias).astype(y.dtype), output="delta", state=state)
    assert new_state is not None
    return out, {**new_state, "sum": total[:, -1]}
