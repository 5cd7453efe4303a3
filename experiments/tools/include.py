"""Puts committed tables into the pages that show them, so that they cannot drift.

    python -m experiments.tools.include README.md docs/*.md

replaces what is between

    <!-- include results/dmc_walker/table2.md -->
    <!-- end -->

by that file; "include FILE table" leaves out its paired differences. Files of
experiments/sentences/ are templates of sentences (`experiments.statements`). Files are
named from the root of the repository. tests/test_results.py and
tests/test_statements.py check every page.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from experiments import statements
from psec_jax.errors import InputError
from psec_jax.files import reported, write_atomic

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?P<head><!-- include (?P<file>\S+)(?P<part> table)? -->\n)"
    r"(?P<body>.*?)(?P<end><!-- end -->)",
    re.DOTALL,
)


def included(page: str) -> str:
    """The page with every block as its file is now.

    Raises:
      InputError: a file that is not there.
    """

    def fill(block: re.Match[str]) -> str:
        with reported(f"read {block['file']}"):
            text = (ROOT / block["file"]).read_text()
        if (ROOT / block["file"]).parent == statements.FOLDER:
            text = statements.render(text)
        if block["part"]:
            text = text.partition("\nPaired differences")[0]
        return f"{block['head']}\n{text.strip()}\n\n{block['end']}"

    return BLOCK.sub(fill, page)


def main(argv: Sequence[str]) -> None:
    """Rewrite the pages named."""
    if len(argv) < 2:
        raise InputError("got no page, expected README.md or others")
    for path in argv[1:]:
        with reported(f"read {path}"):
            page = Path(path).read_text()
        write_atomic(path, included(page))


if __name__ == "__main__":
    from psec_jax.cli import run

    run(main)
