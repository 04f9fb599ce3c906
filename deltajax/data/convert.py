"""Tokenise a corpus once, into ArrayRecord shards.

`python -m deltajax.data.convert --input=~/text --output=~/shards`, then train with `corpus="~/shards"`.
"""

import sys
from typing import NoReturn

from absl import app, flags
from tqdm import tqdm

from deltajax.data.documents import read_documents
from deltajax.data.shards import write_shards
from deltajax.data.tokenizer import load_tokenizer

_INPUT = flags.DEFINE_string("input", None, "folder, file, glob, several joined by commas, or 'stdlib'", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "new folder for the shards", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", "byte", "'byte' or a Hugging Face tokenizers JSON file")
_SHARDS = flags.DEFINE_integer("shards", 8, "files per split", lower_bound=1)
_VALIDATION_FRACTION = flags.DEFINE_float("validation_fraction", 0.05, "expected part of the documents held out")
flags.register_validator(_VALIDATION_FRACTION, lambda f: 0 < f < 1, "allowed: between 0 and 1, both excluded")


def main(argv: list[str]) -> None:
    """Convert, and print what was written."""
    if len(argv) > 1:
        _fail(f"unknown arguments {argv[1:]}; allowed: flags only", 2)
    try:
        index = write_shards(
            _OUTPUT.value,
            tqdm(read_documents(_INPUT.value, _VALIDATION_FRACTION.value), unit=" documents", delay=1),
            load_tokenizer(_TOKENIZER.value),
            num_shards=_SHARDS.value,
            validation_fraction=_VALIDATION_FRACTION.value,
        )
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted, nothing was written", 1)
    for split, lengths in index["documents"].items():
        documents, tokens, size = len(lengths["tokens"]), sum(lengths["tokens"]), sum(lengths["bytes"])
        print(f"{split}: {documents} documents, {tokens} tokens, {size} bytes")


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _fail(" ".join(str(error).split()), 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
