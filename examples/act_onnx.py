"""Act with an exported policy, without JAX: NumPy and onnxruntime alone.

python -m launch.export --library=runs/own/library --skills=up --out=runs/robot \
    --format=onnx
python examples/act_onnx.py runs/robot
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

folder = Path(sys.argv[1])
about = json.loads((folder / "policy.json").read_text())
policy = onnxruntime.InferenceSession(folder / "policy.onnx")
random = np.random.default_rng(0)
obs = np.asarray([about["normaliser"]["mean"]], np.float32)  # [1, S], of your robot
for _ in range(3):
    noise = random.standard_normal((1, *about["noise"]), np.float32)
    (action,) = policy.run(None, {"obs": obs, "noise": noise})  # [1, A], its units
    print(action[0])
