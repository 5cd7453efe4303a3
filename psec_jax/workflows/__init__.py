"""What a run does, from a job to an entry of the library.

    from psec_jax.workflows import Job, base, skill

    job = Job().changed({"base.steps": 5000, "base.batch_size": 256})
    [result] = base.run(job, base.Request("runs/base", "runs/library", data="x.hdf5"))

Each of `base`, `skill`, `gate` and `critics` has a `Request`, a `plan` that touches no
directory, a `publish` that writes the entry, and `run`, which does both around
training, for one request or for several as one program. `auto` decides first whether a
skill is needed.
"""

from psec_jax.workflows import auto, base, critics, gate, skill
from psec_jax.workflows.config import Job
from psec_jax.workflows.demonstrations import Selection

__all__ = ["Job", "Selection", "auto", "base", "critics", "gate", "skill"]
