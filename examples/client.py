"""Act with a policy that `launch.serve` serves: NumPy, msgpack and websockets alone.

python -m launch.serve --library=runs/own/library --skills=up
python examples/client.py ws://127.0.0.1:8000
"""

import sys

import msgpack
import numpy as np
from websockets.sync.client import connect

with connect(
    sys.argv[1]
) as robot:  # with a token: additional_headers={"Authorization":
    about = msgpack.unpackb(robot.recv())  # f"Bearer {token}"}
    for _ in range(3):
        obs = np.zeros(about["obs"], np.float32)  # [S], of your robot
        array = {"dtype": "float32", "shape": obs.shape, "data": obs.tobytes()}
        robot.send(msgpack.packb({"obs": array}))
        reply = msgpack.unpackb(robot.recv())
        if "error" in reply:
            sys.exit(reply["error"])
        action = np.frombuffer(reply["action"]["data"], reply["action"]["dtype"])
        print(action.reshape(reply["action"]["shape"]))  # [A] or [h, A], in its units
