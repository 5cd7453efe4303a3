r"""Serve a composed policy to robots, over websockets.

    python -m launch.serve --library=runs/library --gate=walk-psec
    python examples/client.py ws://127.0.0.1:8000
    curl http://127.0.0.1:8000/health

One connection is one robot, with noise of its own; docs/sharing.md has the messages.
The server listens at 127.0.0.1. At another --host it needs a token, which robots show
as "Authorization: Bearer TOKEN": the first line of --token_file, or $PSEC_TOKEN. What
is sent is not encrypted: across networks, go through a proxy with TLS or a tunnel.
SIGTERM or Ctrl-C ends it.
"""

import asyncio
import os
from collections.abc import Sequence

from absl import flags

from launch import composed
from psec_jax.cli import no_arguments, run
from psec_jax.errors import InputError
from psec_jax.files import read_bytes
from psec_jax.policy import compose, describe

HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at.")
PORT = flags.DEFINE_integer("port", 8000, "Port; 0 takes a free one.", 0, 65535)
TOKEN_FILE = flags.DEFINE_string(
    "token_file", None, "File whose first line is the token; default $PSEC_TOKEN."
)
MAX_BATCH = flags.DEFINE_integer(
    "max_batch",
    1,
    "Act on up to this many waiting observations in one call: faster for many robots, "
    "and actions then differ by rounding with what else is in the call.",
    1,
    1024,
)


def main(argv: Sequence[str]) -> None:
    """Flags to one server."""
    no_arguments(argv)
    try:
        from psec_jax import serving
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed; pip install 'psec_jax[serve]'"
        ) from error
    token = _token()
    serving.check_address(HOST.value, token)
    choice = composed.choice()
    policy = compose(composed.LIBRARY.value, **choice)
    about = describe(
        composed.LIBRARY.value, policy, gate=choice["gate"], alpha=choice["alpha"]
    )

    def started(server: serving.Server) -> None:
        print(f"listening at {', '.join(serving.addresses(server))}", flush=True)

    asyncio.run(
        serving.run(
            policy, about, HOST.value, PORT.value, token, MAX_BATCH.value, started
        )
    )


def _token() -> str | None:
    """The token, or None where none is given."""
    if TOKEN_FILE.value is None:
        return os.environ.get("PSEC_TOKEN")
    lines = read_bytes(TOKEN_FILE.value, 4096).decode("latin-1").splitlines()
    return lines[0].strip() if lines else ""


if __name__ == "__main__":
    run(main)
