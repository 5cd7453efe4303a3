"""psec_jax: composable skills for diffusion policies.

Importing the package loads neither a simulator nor JAX: worker processes that only
step environments import it too.
"""

__version__ = "0.1.0"
