"""Where collected and downloaded data lie."""

import os
from pathlib import Path


def data_dir() -> Path:
    """`$PSEC_DATA_DIR`, or `~/.cache/psec_jax/data`; not created here."""
    named = os.environ.get("PSEC_DATA_DIR")
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "psec_jax" / "data"
