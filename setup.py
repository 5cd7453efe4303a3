"""Packaging of psec_jax: everything that is known of the package is here.

pyproject.toml has the tools' settings. The version is the newest tag vX.Y.Z that git
knows, and between tags the next one with the distance and the commit; in an sdist it is
the one that the sdist was made with, and in a copy without either UNKNOWN.

Lower bounds are the oldest versions the tests have run on, upper bounds the next
release that may break an interface; requirements.txt pins one full, tested set. The
extras experts, mjx, peft, cuda and tpu are not part of that set; requirements-mjx.txt
pins what mjx adds to it. There is none for the d4rl package, with which
experiments.tools.check_d4rl compares: its requirements contradict the others, so it
needs an environment of its own. There is none for ONNX either: jax2onnx asks for an
older orbax-checkpoint than it needs here; requirements-onnx.txt is installed without
its dependencies.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
UNKNOWN = "0.0"
README = ROOT / "README.md"

CORE = [
    "absl-py>=2.3.1,<3",
    "flax>=0.12.8,<0.13",
    "h5py>=3.16,<4",
    "jax>=0.10.2,<0.13",
    "jaxtyping>=0.3.11,<0.4",
    "ml_collections>=1.1,<2",
    "numpy>=2.2,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "safetensors>=0.8,<0.9",
    "tensorboardX>=2.6.5,<3",
]

EXTRAS = {
    # dm_control 1.0.50 accepts mujoco 4.0.0 but does not work with it.
    "dm_control": ["dm_control>=1.0.50,<1.1", "mujoco>=3.17,<4"],
    "mjx": ["dm_control>=1.0.50,<1.1", "mujoco>=3.17,<4", "mujoco-mjx>=3.17,<4"],
    "gymnasium": ["gymnasium[mujoco]>=1.2,<2", "mujoco>=3.17,<4"],
    "plot": ["matplotlib>=3.11,<4", "scikit-learn>=1.7,<2"],
    "video": ["imageio-ffmpeg>=0.6,<1", "pillow>=11"],
    # Minari needs Pillow and does not say so.
    "minari": ["minari>=0.5.4,<0.6", "pillow>=11"],
    "sweep": ["submitit>=1.5.4,<2"],
    "stream": ["grain>=0.2.18,<0.3"],
    "export": ["flatbuffers>=25"],
    "serve": ["msgpack>=1.1,<2", "websockets>=15,<18"],
    "hub": ["huggingface_hub>=2.4,<3"],
    # Skills in PEFT's format are read and written without it; its tests load them.
    "peft": ["peft>=0.21.2,<1", "torch>=2.13,<3"],
    "experts": ["sbx-rl>=0.28,<0.29"],
    "cuda": ["jax[cuda12]"],
    "tpu": ["jax[tpu]"],
    "dev": [
        "beartype>=0.22.1",
        "chex>=0.1.92,<0.2",
        "hypothesis>=6.170,<7",
        # With Node.js from PyPI too, and so nothing to download when it first runs.
        "pyright[nodejs]>=1.1.414,<1.2",
        "pytest>=9,<10",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.17.5,<0.18",
    ],
}
# What the main job, its figures and the tests need; requirements.txt is this set.
EXTRAS["all"] = [
    requirement
    for extra in (
        "dm_control",
        "gymnasium",
        "minari",
        "plot",
        "video",
        "sweep",
        "stream",
        "export",
        "serve",
        "hub",
        "dev",
    )
    for requirement in EXTRAS[extra]
]

setup(
    name="psec_jax",
    use_scm_version={"fallback_version": UNKNOWN},
    description="Composable skills for diffusion policies, in JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The psec_jax authors",
    project_urls={"Paper": "https://arxiv.org/abs/2502.05932"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The commands in experiments/ and launch/ are run from a checkout: names that
    # general do not belong into site-packages.
    packages=find_packages(include=["psec_jax", "psec_jax.*"]),
    package_data={"psec_jax": ["py.typed", "assets/**/*"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    zip_safe=False,
)
