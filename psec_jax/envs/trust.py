"""Which environments a card or a data file may name.

`--env=gymnasium:PACKAGE.MODULE:ID` imports PACKAGE.MODULE, which is code. A user may
name it; a library, a data set or a result that somebody else made may not.
"""

import re
from typing import Any

from psec_jax.data import keywords
from psec_jax.errors import InputError

_WORD = re.compile(r"[\w-]*")  # other texts may name a file


def runs_code(spec: str) -> bool:
    """Whether making this environment imports a module that the name chooses, or hands
    a text to the environment that may name a file.

    Raises:
      InputError: malformed keyword arguments.
    """
    name, options = keywords.split(spec.partition("@")[0])
    return name.count(":") > 1 or not all(map(_harmless, options.values()))


def _harmless(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_harmless, (*value, *value.values())))
    if isinstance(value, list | tuple | set):
        return all(map(_harmless, value))
    if isinstance(value, str | bytes):
        return isinstance(value, str) and _WORD.fullmatch(value) is not None
    return True


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
        raise InputError(f"{owner}: the environment is {spec!r:.60}, expected a name")
    if runs_code(spec):
        raise InputError(
            f"{owner}: names the environment {spec:.300}, which runs code of its "
            f"choice; allow it with {flag}={spec:.300} if you trust it"
        )
    return spec
