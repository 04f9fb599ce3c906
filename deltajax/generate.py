"""Continue a prompt with a trained model: `python -m deltajax.generate --workdir=runs/first_run --prompt="def "`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from deltajax import cli, data
from deltajax.layers.param import abstract_params
from deltajax.models import lm
from deltajax.training import sampling, serialize
from deltajax.training.checkpoint import Checkpoints, abstract_like
from deltajax.training.config import Sampling


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    default = Sampling()
    values = cli.flag_values()
    flags.DEFINE_string("workdir", None, "workdir of a training run", flag_values=values)
    flags.DEFINE_string("prompt", "", "text to continue; may be empty", flag_values=values)
    flags.DEFINE_integer("max_tokens", default.max_tokens, "tokens to draw", flag_values=values)
    flags.DEFINE_float("temperature", default.temperature, "0 takes the likeliest token", flag_values=values)
    flags.DEFINE_integer("top_k", default.top_k, "only the k likeliest tokens", flag_values=values)
    flags.DEFINE_float(
        "top_p", default.top_p, "only the likeliest tokens of this total probability", flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "same seed, same text", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_enum("checkpoint", "latest", ("latest", "best"), "which checkpoint", flag_values=values)

    def action(_: dict[str, str]) -> None:
        if not values.workdir:
            raise ValueError("--workdir: the workdir of a training run is missing")
        how = Sampling(values.max_tokens, values.temperature, values.top_k, values.top_p)
        checkpoints = Checkpoints(Path(values.workdir), read_only=True)
        step = checkpoints.best_step() if values.checkpoint == "best" else checkpoints.steps()[-1]
        config = serialize.from_json(checkpoints.progress(step)["config"])
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        params = checkpoints.restore_params(step, abstract_like(abstract_params(lm.param_specs(config.model)), device))
        text = sampling.continue_text(
            params,
            config.model,
            data.load_tokenizer(config.data.tokenizer),
            os.fsencode(values.prompt),
            jax.random.key(values.seed),
            how,
        )
        sys.stdout.buffer.write(text + b"\n")

    return cli.run(action, values, __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
