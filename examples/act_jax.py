"""Act with an exported policy, with JAX and nothing of psec_jax.

python -m launch.export --library=runs/own/library --skills=up --out=runs/robot
python examples/act_jax.py runs/robot
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

folder = Path(sys.argv[1])
about = json.loads((folder / "policy.json").read_text())
policy = jax.jit(jax.export.deserialize((folder / "policy.jax").read_bytes()).call)
random = np.random.default_rng(0)
obs = np.asarray([about["normaliser"]["mean"]], np.float32)  # [1, S], of your robot
for _ in range(3):
    noise = random.standard_normal((1, *about["noise"]), np.float32)
    action = np.asarray(policy(obs, noise))  # [1, A], in its units
    print(action[0])
