"""Tokenise a corpus once, into ArrayRecord shards.

`python -m deltajax.data.convert --input=~/text --output=~/shards`, then train with `--config.data.corpus=~/shards`.
"""

import sys
from collections.abc import Sequence

from absl import flags

from deltajax import cli
from deltajax.errors import RunError


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    values = cli.flag_values()
    flags.DEFINE_string("input", None, "folder, file, glob, several joined by commas, or 'stdlib'", flag_values=values)
    flags.DEFINE_string("output", None, "new folder for the shards", flag_values=values)
    flags.DEFINE_string("tokenizer", "byte", "'byte' or a Hugging Face tokenizers JSON file", flag_values=values)
    flags.DEFINE_bool(
        "special_tokens", False, "special tokens that a text spells become themselves", flag_values=values
    )
    flags.DEFINE_integer("shards", 8, "files per split", 1, flag_values=values)
    flags.DEFINE_float("validation_fraction", 0.05, "expected part of the documents held out", flag_values=values)

    def action(_: dict[str, str]) -> None:
        for name in ("input", "output"):
            if not values[name].value:
                raise ValueError(f"--{name}: {values[name].help} is missing")
        if not 0 < values.validation_fraction < 1:
            raise ValueError(
                f"--validation_fraction={values.validation_fraction}: must be between 0 and 1, both excluded"
            )
        try:
            _convert(values)
        except KeyboardInterrupt:
            raise RunError("interrupted, nothing was written") from None

    return cli.run(action, values, __doc__ or "", argv)


def _convert(values: flags.FlagValues) -> None:
    from tqdm import tqdm  # here, so that Ctrl-C while they are imported is one line too

    from deltajax.data.documents import read_documents
    from deltajax.data.shards import write_shards
    from deltajax.data.tokenizer import load_tokenizer

    index = write_shards(
        values.output,
        tqdm(read_documents(values.input, values.validation_fraction), unit=" documents", delay=1),
        load_tokenizer(values.tokenizer, values.special_tokens),
        num_shards=values.shards,
        validation_fraction=values.validation_fraction,
    )
    for split, lengths in index["documents"].items():
        documents, tokens, size = len(lengths["tokens"]), sum(lengths["tokens"]), sum(lengths["bytes"])
        print(f"{split}: {documents} documents, {tokens} tokens, {size} bytes")


if __name__ == "__main__":
    sys.exit(main())
