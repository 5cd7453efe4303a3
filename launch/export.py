r"""Write a composed policy as files that run without this package.

    python -m launch.export --library=runs/library --gate=walk-psec --out=runs/robot
    python -m launch.export --library=runs/library --skills=walk --alpha=16 \
        --out=runs/robot --format=jax,onnx

The folder gets policy.json, policy.jax (`jax.export`; needs the extra export) and
policy.onnx (needs `make setup-onnx`). A file is the function of raw observations [B, S]
and standard normal noise [B, ...] that gives actions [B, A] in the environment's units,
with normaliser, skills and gate inside; it is compared with `policy.act` before it is
written. examples/act_jax.py and examples/act_onnx.py run one. A single skill in PEFT's
format is written by `launch.library export`.
"""

from collections.abc import Sequence

from absl import flags

from launch import composed
from psec_jax import exporting
from psec_jax.cli import no_arguments, run

OUT = flags.DEFINE_string(
    "out",
    None,
    "Folder to be written, a new one or one of an earlier export.",
    required=True,
)
FORMAT = flags.DEFINE_list("format", ["jax"], "jax, onnx or both.")


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    no_arguments(argv)
    about = exporting.export(
        composed.LIBRARY.value,
        OUT.value,
        FORMAT.value,
        **composed.choice(),
    )
    for name, difference in about["differences"].items():
        print(
            f"{OUT.value}/policy.{name}: obs {about['obs']}, noise {about['noise']} -> "
            f"action {about['action']}; at most {difference:.1g} from policy.act"
        )


if __name__ == "__main__":
    run(main)
