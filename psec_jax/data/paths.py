"""Where data and compiled programs are kept between runs."""

import os
from pathlib import Path


def data_dir() -> Path:
    """`$PSEC_DATA_DIR`, or `~/.cache/psec_jax/data`; not created here."""
    named = os.environ.get("PSEC_DATA_DIR")
    return Path(named).expanduser() if named else cache_dir() / "data"


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/psec_jax`, or `~/.cache/psec_jax`; not created here."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "psec_jax"
