"""Continue a prompt with a trained model: `python -m deltajax.generate --workdir=runs/first_run --prompt="def "`.

How tokens are drawn is, where no flag says otherwise, what the run's config says.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence

from absl import flags

from deltajax import cli


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    values = cli.flag_values()
    flags.DEFINE_string("workdir", None, "workdir of a training run", flag_values=values)
    flags.DEFINE_string("prompt", "", "text to continue; may be empty", flag_values=values)
    flags.DEFINE_integer("max_tokens", None, "tokens to draw", flag_values=values)
    flags.DEFINE_float("temperature", None, "0 takes the likeliest token", flag_values=values)
    flags.DEFINE_integer("top_k", None, "only the k likeliest tokens", flag_values=values)
    flags.DEFINE_float("top_p", None, "only the likeliest tokens of this total probability", flag_values=values)
    flags.DEFINE_integer("seed", 0, "same seed, same text", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_enum("checkpoint", "latest", ("latest", "best"), "which checkpoint", flag_values=values)

    def action(_: dict[str, str]) -> None:
        if not values.workdir:
            raise ValueError("--workdir: the workdir of a training run is missing")
        sys.stdout.buffer.write(_generate(values) + b"\n")

    return cli.run(action, values, __doc__ or "", argv, result_is_printed=True)


def _generate(values: flags.FlagValues) -> bytes:
    import jax  # here, so that Ctrl-C while it is imported is one line too

    from deltajax import data
    from deltajax.models import registry
    from deltajax.training import pretrained, sampling
    from deltajax.training.config import Sampling

    given = {name: getattr(values, name) for name in ("max_tokens", "temperature", "top_k", "top_p")}
    given = {name: value for name, value in given.items() if value is not None}
    Sampling(**given)  # complains of values out of range before anything is read
    found = pretrained.load(values.workdir, values.checkpoint)
    config = found.config
    if not hasattr(registry.module_of(config.model), "init_state") or not found.progress["tokenizer"]:
        raise ValueError(f"--workdir={values.workdir}: it holds no language model of text")
    how = dataclasses.replace(config.sampling, **given)
    tokenizer = data.load_tokenizer(config.data.tokenizer, config.data.special_tokens)
    if tokenizer.identity != found.progress["tokenizer"]:
        raise ValueError(f"tokenizer: {config.data.tokenizer!r} is not the one that the model was trained with")
    key = jax.random.key(values.seed)
    return sampling.continue_text(found.params, config.model, tokenizer, os.fsencode(values.prompt), key, how)


if __name__ == "__main__":
    sys.exit(main())
