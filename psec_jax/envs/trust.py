"""Which environments a card or a data file may name.

`--env=gymnasium:PACKAGE.MODULE:ID` imports PACKAGE.MODULE, which is code. A user may
name it; a library, a data set or a result that somebody else made may not.
"""

import re

from psec_jax.errors import InputError

# A keyword argument that is a number or a truth value; a text may name a file.
_PLAIN = re.compile(r"\w+=(true|false|none|[+-]?[\d.]+(e[+-]?\d+)?)", re.I | re.ASCII)


def imports_code(spec: str) -> bool:
    """Whether making this environment imports a module that the name chooses, or hands
    a text of the name to the environment."""
    plain, _, arguments = spec.partition("?")
    name = plain.partition("@")[0]
    texts = [a for a in arguments.split("@")[0].split("&") if arguments]
    return name.count(":") > 1 or not all(map(_PLAIN.fullmatch, texts))


def check_untrusted(spec: object, owner: str, flag: str = "--env") -> str:
    """The environment that a card or a data file names, if it may be made.

    Args:
      spec: what it names, such as "gymnasium:Hopper-v5".
      owner: the card or file, named in the message.
      flag: what allows any environment, named in the message.

    Returns:
      `spec`.

    Raises:
      InputError: no text, or an environment that is code of the owner's choice.
    """
    if not isinstance(spec, str):
        raise InputError(f"{owner}: the environment is {spec!r}, expected a name")
    if imports_code(spec):
        raise InputError(
            f"{owner}: names the environment {spec}, which runs code of its choice; "
            f"allow it with {flag}={spec} if you trust it"
        )
    return spec
