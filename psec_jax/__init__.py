"""psec_jax: composable skills for diffusion policies.

Importing the package loads neither a simulator nor JAX: worker processes that only
step environments import it too.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("psec_jax")
except PackageNotFoundError:  # a copy that was never installed
    __version__ = "0.0"
