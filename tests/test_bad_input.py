"""Bad input to the commands: one line, exit code 2, nothing lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import short
from shell import call

from psec_jax.data import d4rl
from psec_jax.library import SkillLibrary
from psec_jax.types import Dataset

OBS_DIM, ACTION_DIM = 24, 6  # the walker's
TINY = (
    "--config.network.width=16",
    "--config.network.blocks=1",
    "--config.base.episodes=2",
    "--config.base.steps=2",
    "--config.base.batch_size=8",
    "--config.skill.episodes=2",
    "--config.skill.steps=2",
    "--config.skill.batch_size=8",
    "--config.gate.steps=2",
    "--config.gate.batch_size=8",
    "--config.evaluation.episodes=1",
    "--config.support.queries=32",
    "--config.support.steps=2",
)
PRETRAIN = ("launch.pretrain", *TINY, "--workdir=new", "--library=none")
EXPAND = ("launch.expand", *TINY, "--workdir=new", "--library=lib", "--name=new")
COMPOSE = ("launch.compose", *TINY, "--workdir=new", "--library=lib", "--name=new")
EVALUATE = ("launch.evaluate", "--library=lib", "--env=dm_control:walker-walk")
COLLECT = ("experiments.tools.collect", "--env=dm_control:walker-walk", "--workers=1")
WALKER = "--data=walker.hdf5"


def demos(episodes=3, length=8, obs_dim=OBS_DIM, action_dim=ACTION_DIM):
    generator = np.random.default_rng(0)
    n = episodes * length
    obs = generator.normal(size=(n, obs_dim)).astype(np.float32)
    ended = np.arange(n) % length == length - 1
    return Dataset(
        obs=obs,
        action=generator.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        reward=np.ones(n, np.float32),
        cost=np.zeros(n, np.float32),
        next_obs=obs,
        terminal=np.zeros(n, bool),
        timeout=ended,
    )


def changed(path, key, change):
    """A copy of the good file with one array changed, or removed."""
    shutil.copy("walker.hdf5", path)
    with h5py.File(path, "r+") as file:
        del file.attrs[d4rl.CHECKSUM]
        value = change(file[key][()])
        del file[key]
        if value is not None:
            file[key] = value


def poked(index, value):
    def change(array):
        array[index] = value
        return array

    return change


def write_bad_files():
    """One file for each way in which a file can be bad."""
    good = Path("walker.hdf5").read_bytes()
    Path("truncated.hdf5").write_bytes(good[: len(good) // 2])
    Path("header.hdf5").write_bytes(good[:100])
    Path("empty.hdf5").write_bytes(b"")
    Path("text.hdf5").write_text("not HDF5")
    Path("text.npz").write_text("not npz")
    Path("folder").mkdir()
    changed("no_actions.hdf5", "actions", lambda x: None)
    changed("short_actions.hdf5", "actions", lambda x: x[:-1])
    changed("flat.hdf5", "observations", lambda x: x[:, 0])
    changed("nan.hdf5", "observations", poked((3, 4), np.nan))
    changed("inf.hdf5", "rewards", poked(3, np.inf))
    changed("huge.hdf5", "rewards", lambda x: x * np.float64(1e300))
    changed("words.hdf5", "actions", lambda x: x.astype("S8"))
    changed("unsure.hdf5", "terminals", lambda x: np.full(len(x), np.nan))
    changed("no_action.hdf5", "actions", lambda x: x[:, :0])
    changed("loud.hdf5", "actions", poked((slice(2, 4), 0), 1.5))
    d4rl.save("other_obs.hdf5", demos(obs_dim=17), {})
    d4rl.save("other_action.hdf5", demos(action_dim=5), {})
    d4rl.save("one.hdf5", demos(episodes=1), {})
    d4rl.save("cheetah.hdf5", demos(obs_dim=17, action_dim=6), {})


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder to work in, with good files, bad files, a library and finished runs."""
    folder = tmp_path_factory.mktemp("bad_input")
    root = Path(__file__).parents[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PSEC_DATA_DIR", str(folder / "data"))
        patch.setenv("PYTHONPATH", os.path.dirname(short.__file__))
        (folder / "experiments").symlink_to(root / "experiments")
        d4rl.save("walker.hdf5", demos(), {})
        write_bad_files()
        for name, field in {"small": "steps", "odd": "stepz"}.items():
            values = {"skill": {field: 2}}
            Path(f"{name}.py").write_text(
                "from ml_collections import ConfigDict\n\n\n"
                f"def get_config():\n    return ConfigDict({values})\n"
            )
        made = (
            ("launch.pretrain", "--workdir=base"),
            ("launch.expand", "--workdir=walk", "--name=walk"),
            ("launch.expand", "--workdir=thin", "--name=thin", "--data=one.hdf5")
            + ("--config.skill.episodes=1",),
            ("launch.expand", "--workdir=mlp", "--name=mlp")
            + ("--config.skill.adapter=mlp",),
            ("launch.compose", "--workdir=gate", "--name=gate", "--skills=walk")
            + ("--config.gate.head=constant", "--config.gate.support=neighbour")
            + ("--support_data=walker.hdf5",),
            ("launch.compose", "--workdir=linear", "--name=linear", "--skills=walk"),
        )
        for module, *arguments in made:
            answer = call(
                module, *TINY, "--library=lib", WALKER, "--noevaluate", *arguments
            )
            assert answer.code == 0, answer.err
        library = SkillLibrary.open("lib")
        library.add_skill("bare", library.load_skill("walk")[0], {"alpha": 16.0})
        yield folder


def files(folder="."):
    """Every file's content; links are not followed."""
    found = {}
    for top, _, names in os.walk(folder):
        for name in names:
            path = Path(top, name)
            found[str(path)] = path.read_bytes()
    return found


def refused(words, *command):
    """The command says one line with these words, and leaves every file as it was."""
    before = files()
    answer = call(*command)
    assert answer.code == 2, answer
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1, answer.err
    assert words in answer.err, answer.err
    assert answer.out == ""
    after = files()
    names = before.keys() | after.keys()
    assert not [name for name in names if before.get(name) != after.get(name)]


FILES = {
    "gone.hdf5": "gone.hdf5: no such file",
    "truncated.hdf5": "truncated.hdf5: not a readable HDF5 file, or a truncated one",
    "header.hdf5": "header.hdf5: not a readable HDF5 file",
    "empty.hdf5": "empty.hdf5: not a readable HDF5 file",
    "text.hdf5": "text.hdf5: not a readable HDF5 file",
    "text.npz": "text.npz: not a readable .npz",
    "folder": "folder: no episode files (*.npz) in this folder",
    "no_actions.hdf5": "no dataset 'actions'; the file holds next_obs",
    "short_actions.hdf5": "actions has shape (23, 6) but observations has 24 rows",
    "flat.hdf5": "expected [N, S] and [N, A]",
    "nan.hdf5": "obs holds 1 NaN or infinite of 576 values",
    "inf.hdf5": "reward holds 1 NaN or infinite of 24 values",
    "huge.hdf5": "reward holds 24 NaN or infinite of 24 values",
    "words.hdf5": "actions has type |S8, expected numbers",
    "unsure.hdf5": "terminals holds other values than 0 and 1",
    "no_action.hdf5": "action (24, 0), expected one number or more in each",
    "loud.hdf5": "2 of 144 action values lie outside [-1, 1] (largest magnitude 1.5)",
    "one.hdf5": "asked for 2 trajectories, one.hdf5 has 1",
}


@pytest.mark.parametrize("name", FILES)
def test_files(name):
    refused(FILES[name], *PRETRAIN, f"--data={name}")


def test_every_stage_reads_files_alike():
    refused("obs holds 1 NaN", *EXPAND, "--data=nan.hdf5")
    refused("obs holds 1 NaN", *COMPOSE, "--skills=walk", "--data=nan.hdf5")


SIZES = {
    "obs of the base": (
        (*EXPAND, "--data=other_obs.hdf5"),
        "other_obs.hdf5: observations have 17 numbers, the library's base expects 24",
    ),
    "actions of the base": (
        (*EXPAND, "--data=other_action.hdf5"),
        "other_action.hdf5: actions have 5 numbers, the library's base expects 6",
    ),
    "obs of a composition": (
        (*COMPOSE, "--skills=walk", "--data=other_obs.hdf5"),
        "observations have 17 numbers, the library's base expects 24",
    ),
    "obs of the environment": (
        (*PRETRAIN, "--data=cheetah.hdf5", "--env=dm_control:walker-stand"),
        "observations have 17 numbers, dm_control:walker-stand expects 24",
    ),
    "actions of the environment": (
        (*PRETRAIN, "--data=other_action.hdf5", "--env=dm_control:walker-stand"),
        "actions have 5 numbers, dm_control:walker-stand expects 6",
    ),
    "evaluation elsewhere": (
        ("launch.evaluate", "--library=lib", "--env=dm_control:cartpole-swingup"),
        "observations have 5 numbers, the policy's base expects 24",
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    command, words = SIZES[name]
    refused(words, *command)


UNKNOWN = {
    "env without a prefix": (
        (*PRETRAIN, WALKER, "--env=walker"),
        "environment 'walker': expected PREFIX:NAME",
    ),
    "env prefix": (
        (*PRETRAIN, WALKER, "--env=atari:pong"),
        "unknown environment prefix 'atari'; choose from bullet, dm_control, gymnasium",
    ),
    "task of mjx": (
        (*COLLECT[:1], "--env=mjx:walker-fly"),
        "unknown task of mjx 'walker-fly'; choose from cartpole-balance",
    ),
    "domain": (
        (*EXPAND, WALKER, "--env=dm_control:runner-walk"),
        "unknown domain 'runner'",
    ),
    "task": (
        (*COLLECT[:1], "--env=dm_control:walker-fly"),
        "unknown task 'fly' of walker; choose from walker-run, walker-stand",
    ),
    "gymnasium ID": (
        ("launch.evaluate", "--library=lib", "--env=gymnasium:Nope-v0"),
        "gymnasium:Nope-v0: ",
    ),
    "expert": (
        (*PRETRAIN, "--env=dm_control:cartpole-swingup"),
        "no packaged expert for dm_control:cartpole-swingup",
    ),
    "policy": ((*COLLECT, "--policy=bold"), "unknown policy 'bold'"),
    "policy of the config": (
        (*EXPAND, "--config.data.policy=bold"),
        "unknown policy 'bold'",
    ),
    "skill of a gate": (
        (*COMPOSE, WALKER, "--skills=fly"),
        "lib has no skill 'fly'; it has bare, mlp, thin, walk",
    ),
    "skill of an evaluation": (
        (*EVALUATE, "--skills=fly"),
        "lib has no skill 'fly'; it has bare, mlp, thin, walk",
    ),
    "gate": ((*EVALUATE, "--gate=fly"), "lib has no gate 'fly'; it has gate"),
    "entry": (
        ("launch.library", "show", "fly", "--library=lib"),
        "lib has no 'fly'; it has base, bare, mlp, thin, walk, gate",
    ),
    "level of a gate": (
        (*COMPOSE, WALKER, "--skills=walk", "--config.gate.level=soul"),
        "unknown level 'soul'; choose from action, noise, parameter",
    ),
    "level of an evaluation": (
        (*EVALUATE, "--skills=walk", "--level=soul"),
        "unknown level 'soul'; choose from action, noise, parameter",
    ),
    "level of a base": ((*EVALUATE, "--level=soul"), "unknown level 'soul'"),
    "level without a loss": (
        (*COMPOSE, WALKER, "--skills=walk", "--config.gate.level=action")
        + ("--config.gate.loss=diffusion",),
        "level for the gate loss 'diffusion'",
    ),
    "preset": (
        (*PRETRAIN, WALKER, "--config=experiments/configs/dmc_walker.py:huge"),
        "unknown preset 'huge'; choose from paper, quick, standard",
    ),
    "config file": (
        (*PRETRAIN, WALKER, "--config=experiments/configs/gone.py"),
        "there is no such config file",
    ),
    "config field": (
        (*PRETRAIN, WALKER, "--config.base.step=3"),
        'unknown config field \'step\'. Did you mean "steps" instead of "step"?',
    ),
    "objective": (
        (*EXPAND, WALKER, "--config.skill.objective=magic"),
        "unknown objective 'magic'; choose from bc",
    ),
    "objective by flag": (
        (*EXPAND, WALKER, "--objective=magic"),
        "unknown objective 'magic'; choose from bc, dql, fisor, reward, safety",
    ),
    "objective of a base": (
        (*PRETRAIN, WALKER, "--objective=magic"),
        "unknown objective 'magic'; choose from bc, dql, fisor, reward, safety",
    ),
    "filter": (
        (*EXPAND, WALKER, "--filter=taste"),
        "unknown filter 'taste'; choose from density, outliers",
    ),
    "DSRL task": (
        (*PRETRAIN, "--data=OfflineLuck-v0", "--offline"),
        "unknown DSRL task 'OfflineLuck-v0'; choose from OfflineAntCircle-v0",
    ),
    "DSRL task of support data": (
        (*COMPOSE, WALKER, "--skills=walk", "--support_data=OfflineLuck-v0"),
        "unknown DSRL task 'OfflineLuck-v0'",
    ),
    "DSRL task of the base's data": (
        (*COMPOSE, WALKER, "--skills=walk", "--base_data=OfflineLuck-v0"),
        "unknown DSRL task 'OfflineLuck-v0'",
    ),
    "adapter": (
        (*EXPAND, WALKER, "--config.skill.adapter=glue"),
        "unknown adapter 'glue'; choose from lora, mlp",
    ),
    "head": (
        (*COMPOSE, WALKER, "--skills=walk", "--config.gate.head=big"),
        "unknown head 'big'; choose from constant, linear",
    ),
    "support": (
        (*COMPOSE, WALKER, "--skills=walk", "--config.gate.support=moral"),
        "unknown support 'moral'; choose from learned, nearest, neighbour, none",
    ),
    "gate loss": (
        (*COMPOSE, WALKER, "--skills=walk", "--config.gate.loss=total"),
        "gate: unknown loss 'total'; choose from auto, cloning, critic, diffusion",
    ),
    "gate start": (
        (*COMPOSE, WALKER, "--skills=walk", "--config.gate.start=late"),
        "gate: unknown start 'late'; choose from strength, zero",
    ),
    "normaliser": (
        (*PRETRAIN, WALKER, "--config.normaliser=batch"),
        "unknown normaliser 'batch'; choose from none, standard",
    ),
    "sampler": (
        (*PRETRAIN, WALKER, "--config.diffusion.sampler=gibbs"),
        "unknown sampler 'gibbs'; choose from ddim, ddpm",
    ),
    "schedule": (
        (*PRETRAIN, WALKER, "--config.diffusion.schedule=late"),
        "unknown schedule 'late'",
    ),
    "activation": (
        (*PRETRAIN, WALKER, "--config.network.activation=gelu"),
        "unknown activation 'gelu'",
    ),
    "dtype": (
        (*EVALUATE, "--matmul_dtype=int4"),
        "matmul_dtype: got 'int4', expected float32 or bfloat16",
    ),
    "field of sampling": (
        (*EVALUATE, "--sampling=heat=1"),
        "unknown field of --sampling 'heat'; choose from execute, sampler",
    ),
    "value of sampling": (
        (*EVALUATE, "--sampling=temperature=warm"),
        "--sampling: got 'temperature=warm', expected temperature=float",
    ),
    "sampling without a value": (
        (*EVALUATE, "--sampling=sampler"),
        "--sampling: got 'sampler', expected sampler=VALUE",
    ),
    "method of the table": (
        ("experiments.table2", "--methods=Luck", "--results=r", "--workdir=w"),
        "unknown method 'Luck'; choose from ASEC, ASEC fixed, Base",
    ),
    "preset of the table": (
        ("experiments.table2", "--preset=huge", "--results=r", "--workdir=w"),
        "unknown preset 'huge'",
    ),
    "results of the table": (
        ("experiments.table2", "--tables_only", "--results=r"),
        "r/table2.jsonl: no raw results; measure something first",
    ),
    "library": (
        ("launch.evaluate", "--library=none", "--env=dm_control:walker-walk"),
        "none is not a skill library",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names(name):
    command, words = UNKNOWN[name]
    refused(words, *command)


def field(stage, name, value, words):
    """A case of `NUMBERS`: one config field changed."""
    skills = ("--skills=walk",) if stage is COMPOSE else ()
    return (*stage, WALKER, *skills, f"--config.{name}={value}"), words


NUMBERS = [
    field(PRETRAIN, "base.steps", -1, "base.steps: got -1, expected 1 or more"),
    field(PRETRAIN, "base.steps", 0, "base.steps: got 0, expected 1 or more"),
    field(PRETRAIN, "base.steps", "2.5", "base.steps"),
    field(PRETRAIN, "base.batch_size", 0, "base.batch_size: got 0, expected 1 or more"),
    field(PRETRAIN, "base.episodes", -1, "base.episodes: got -1, expected 0 or more"),
    field(PRETRAIN, "base.learning_rate", 0, "learning_rate: got 0"),
    field(PRETRAIN, "base.learning_rate", "nan", "base.learning_rate: got nan"),
    field(PRETRAIN, "base.ema", 0, "ema: got 0"),
    field(PRETRAIN, "base.weight_decay", -1, "weight_decay: got -1"),
    field(PRETRAIN, "base.dropout", 1, "dropout: got 1"),
    field(PRETRAIN, "std_floor", 0, "std_floor: got 0"),
    field(PRETRAIN, "network.width", 0, "width: got 0, expected 1 or more"),
    field(PRETRAIN, "diffusion.steps", 0, "steps: got 0, expected 1 or more"),
    field(PRETRAIN, "diffusion.sampling_steps", 9, "sampling_steps: got 9"),
    field(PRETRAIN, "run.log_every", 0, "run.log_every: got 0, expected 1 or more"),
    field(PRETRAIN, "run.save_every", -3, "run.save_every: got -3"),
    field(PRETRAIN, "run.steps_per_call", -1, "run.steps_per_call: got -1"),
    field(PRETRAIN, "evaluation.episodes", 0, "evaluation.episodes: got 0, expected 1"),
    field(PRETRAIN, "evaluation.seed", -1, "evaluation.seed: got -1, expected 0"),
    field(EXPAND, "skill.steps", 0, "skill.steps: got 0, expected 1 or more"),
    field(EXPAND, "skill.batch_size", -8, "skill.batch_size: got -8"),
    field(EXPAND, "skill.rank", 0, "skill.rank: got 0, expected 1 or more"),
    field(EXPAND, "skill.alpha", 0, "skill.alpha: got 0"),
    field(EXPAND, "skill.alpha", "inf", "skill.alpha: got inf, expected a finite"),
    field(COMPOSE, "gate.steps", 0, "gate.steps: got 0, expected 1 or more"),
    field(COMPOSE, "gate.batch_size", 0, "gate.batch_size: got 0, expected 1 or more"),
    field(COMPOSE, "gate.widths", "(8,0)", "widths: got (8, 0), expected 1 or"),
    field(COMPOSE, "gate.top_k", 0, "top_k: got 0, expected 1 or more"),
    field(COMPOSE, "gate.top_k", -1, "top_k: got -1, expected 1 or more"),
    field(COMPOSE, "gate.top_p", 0.5, "gate.top_p: got 0.5 with the head 'linear'"),
    field(COMPOSE, "gate.temperature", 2, "gate.temperature: got 2.0 with the head"),
    *(
        (
            (*COMPOSE, WALKER, "--skills=walk", "--config.gate.head=topp")
            + (f"--config.gate.{name}={value}",),
            f"gate.{name}: got {value}, expected {words}",
        )
        for name, value, words in (
            ("top_p", 0.0, "in (0, 1]"),
            ("top_p", -0.1, "in (0, 1]"),
            ("top_p", 1.1, "in (0, 1]"),
            ("temperature", 0.0, "above 0"),
            ("temperature", -2.0, "above 0"),
        )
    ),
    field(COMPOSE, "support.quantile", 2, "quantile: got 2"),
    field(COMPOSE, "support.expectile", 1, "expectile: got 1"),
    field(COMPOSE, "support.steps", 0, "steps: got 0, expected 1 or more"),
    ((*EVALUATE, "--episodes=0"), "episodes is 0, expected 1 or more"),
    ((*EVALUATE, "--episodes=x"), "flag --episodes=x"),
    ((*EVALUATE, "--seed=-1"), "seed"),
    ((*COLLECT, "--episodes=0"), "episodes is 0, expected 1 or more"),
    ((*COLLECT, "--seed=-1"), "seed is -1, expected 0 or more"),
    ((*COLLECT, "--workers=0"), "workers is 0, expected 1 or more"),
    ((*COLLECT, "--action_noise=-1"), "action_noise is -1.0, expected 0 or more"),
    ((*PRETRAIN, WALKER, "--seed=-1"), "seed"),
    ((*PRETRAIN, WALKER, f"--seed={2**32}"), "seed"),
    ((*EVALUATE, "--candidates=0"), "candidates: got 0, expected 1 or more"),
    ((*EVALUATE, "--candidates=2"), "candidates: got 2, more than 1 need critics"),
    ((*EXPAND, WALKER, "--split=0"), "pieces of 0 steps asked for, expected 1 or"),
    ((*EXPAND, WALKER, "--share=0"), "share of trajectories: got 0, expected 0 to 1"),
    ((*EXPAND, WALKER, "--return_quantile=2"), "return_quantile: got 2, expected 0"),
    ((*EXPAND, WALKER, "--max_cost=9"), "walker.hdf5: no dataset 'costs'; the file"),
    ((*COMPOSE, WALKER, "--skills=walk", "--alpha=1,2"), "got 2 weights, expected 1"),
    ((*COMPOSE, WALKER, "--skills=walk", "--alpha=nan"), "--alpha: got nan"),
    ((*COMPOSE, WALKER, "--skills=walk", "--alpha=x"), "--alpha: could not convert"),
    ((*COMPOSE, WALKER, "--skills="), "skills: got none"),
    (
        (*COMPOSE, WALKER, "--skills=walk", "--config.gate.head=topk")
        + ("--config.gate.top_k=2",),
        "gate.top_k: got 2, expected 1 or less for 1 skills",
    ),
    ((*EVALUATE, "--skills=walk", "--alpha=1,2"), "alpha: got 2 weights for 1 skills"),
    ((*EVALUATE, "--skills=walk,thin"), "2 skills need a gate, or one alpha for each"),
    ((*EVALUATE, "--alpha=3"), "alpha: got 1 weights for no skills"),
    ((*EVALUATE, "--gate=gate", "--alpha=3"), "alpha and gate 'gate' were both given"),
    ((*EVALUATE, "--gate=gate", "--skills=thin"), "gate 'gate' weighs the skills"),
    (
        (*EVALUATE, "--skills=walk,mlp", "--alpha=1,1"),
        "skills 'walk' (lora) and 'mlp' (mlp): cannot compose lora and mlp",
    ),
    (
        ("experiments.table2", "--seeds=a", "--results=r", "--workdir=w"),
        "--seeds: got 'a'",
    ),
]


@pytest.mark.parametrize(("command", "words"), NUMBERS, ids=lambda x: str(x)[-40:])
def test_numbers(command, words):
    refused(words, *command)


SUPPORT = ("--config.gate.head=constant", "--config.gate.support=neighbour")
START = (*COMPOSE, WALKER, "--noevaluate")
FORMS = {
    "a thin skill has no support": (
        (*COMPOSE, WALKER, "--skills=thin", *SUPPORT, "--support_data=one.hdf5"),
        "skill 'thin' was learned from 1 trajectory",
    ),
    "a card without an environment": (
        (*COMPOSE, "--skills=bare"),
        "env: the card of skill 'bare' names no environment; give one",
    ),
    "a card without data": (
        (*COMPOSE, WALKER, "--skills=bare", "--env=dm_control:walker-walk", *SUPPORT),
        "skill 'bare': its card names no data to collect again; give --support_data",
    ),
    "a config file with an unknown field": (
        (*EXPAND[:1], "--config=odd.py", "--workdir=new", "--library=lib")
        + ("--name=new", WALKER),
        "unknown config field 'skill.stepz'; choose from adapter, alpha, batch_size",
    ),
    "a config file that leaves out what has a default": (
        (*EXPAND[:1], "--config=small.py", "--workdir=new", "--library=lib")
        + ("--name=new", WALKER),
        "asked for 10 trajectories, walker.hdf5 has 3",
    ),
    "an objective of costs on data without": (
        (*EXPAND, WALKER, "--objective=safety"),
        "walker.hdf5: no dataset 'costs'",
    ),
    "critics that no objective reads": (
        (*EXPAND, WALKER, "--critics=base"),
        "critics: base was given, the objective bc reads none",
    ),
    "a folder without critics": (
        (*EVALUATE, "--candidates=2", "--critics=base"),
        "base holds no finished critics (critics.safetensors)",
    ),
    "support data of another skill": (
        (*COMPOSE, WALKER, "--skills=walk", *SUPPORT, "--support_data=other_obs.hdf5"),
        "other_obs.hdf5: not the data skill 'walk' was learned from",
    ),
    "support data for other skills": (
        (*COMPOSE, WALKER, "--skills=walk,thin", *SUPPORT, "--alpha=8,8")
        + ("--support_data=one.hdf5",),
        "support_data: got 1 files for 2 skills",
    ),
    "a constant head without weights": (
        (*COMPOSE, WALKER, "--skills=walk,thin", "--config.gate.head=constant"),
        "alpha: a constant head over 2 skills needs 2 weights",
    ),
    "layers of their own at the action level": (
        (*COMPOSE, WALKER, "--skills=walk", "--config.gate.per_layer=True")
        + ("--config.gate.level=action",),
        "gate.per_layer: got True with the head 'linear' at the action level",
    ),
    "layers of their own under select": (
        (*COMPOSE, WALKER, "--skills=walk", "--config.gate.per_layer=True")
        + ("--config.gate.head=select",),
        "gate.per_layer: got True with the head 'select'",
    ),
    "layers of their own and the authors' regulariser": (
        (*COMPOSE, WALKER, "--skills=walk", "--config.gate.per_layer=True")
        + ("--config.gate.compat=released",),
        "compat: got 'released' with weights for each layer",
    ),
    "weights of other layers": (
        (*COMPOSE, WALKER, "--skills=walk", "--alpha=1,2")
        + ("--config.gate.head=constant", "--config.gate.per_layer=True"),
        "alpha: got 2 weights, expected 1, or 6 x 1 of the layers",
    ),
    "a start that is not there": (
        (*START, "--start=none", "--skills=walk,thin"),
        "lib has no gate 'none'; it has gate, linear",
    ),
    "a start of other skills": (
        (*START, "--start=linear", "--skills=thin,walk"),
        "start: gate 'linear' weighs walk; expected the first of the skills thin, walk",
    ),
    "a start of the same skills": (
        (*START, "--start=linear", "--skills=walk"),
        "start: gate 'linear' weighs walk; expected the first of the skills walk, in",
    ),
    "a start of another head": (
        (*START, "--start=linear", "--skills=walk,thin", "--config.gate.head=softmax"),
        "start: gate 'linear' has head linear, this one softmax; expected the same",
    ),
    "a start of other widths": (
        (*START, "--start=linear", "--skills=walk,thin", "--config.gate.widths=(8,)"),
        "start: gate 'linear' has widths (256, 256), this one (8,); expected the same",
    ),
    "a start without layers of their own": (
        (*START, "--start=linear", "--skills=walk,thin")
        + ("--config.gate.per_layer=True",),
        "start: gate 'linear' has layers 0, this one 6; expected the same",
    ),
    "a start at another level": (
        (*START, "--start=linear", "--skills=walk,thin", "--config.gate.level=noise"),
        "start: gate 'linear' has level parameter, this one noise; expected the same",
    ),
    "a start that is not trained": (
        (*START, "--start=gate", "--skills=walk,thin", *SUPPORT),
        "start: the head 'constant' is not trained, give none",
    ),
    "a start and weights": (
        (*START, "--start=linear", "--skills=walk,thin", "--alpha=1,2"),
        "alpha: got weights and a gate to start from, expected one",
    ),
    "a name with a slash": (
        (
            "launch.expand",
            *TINY,
            "--workdir=new",
            "--library=lib",
            "--name=a/b",
            WALKER,
        ),
        "skill name 'a/b': expected letters, digits",
    ),
    "a name that is taken": (
        ("launch.expand", *TINY, "--workdir=new", "--library=lib", "--name=walk")
        + (WALKER, "--seed=5"),
        "lib has a skill 'walk' already, made by another run",
    ),
    "a gate's name that is taken": (
        ("launch.compose", *TINY, "--workdir=new", "--library=lib", "--name=gate")
        + (WALKER, "--skills=walk"),
        "lib has a gate 'gate' already, made by another run",
    ),
    "a base that is there": (
        ("launch.pretrain", *TINY, "--workdir=new", "--library=lib", WALKER)
        + ("--seed=5",),
        "lib has a base already, made by another run; choose another library",
    ),
    "a library that is a file": (
        ("launch.expand", *TINY, "--workdir=new", "--library=walker.hdf5", "--name=a"),
        "walker.hdf5 is not a skill library",
    ),
    "a workdir of another stage": (
        ("launch.expand", *TINY, "--workdir=base", "--library=lib", "--name=new")
        + (WALKER,),
        'holds another run; stage: got "skill", the run has "base"',
    ),
    "a workdir of another config": (
        ("launch.expand", *TINY, "--workdir=walk", "--library=lib", "--name=new")
        + (WALKER, "--config.skill.rank=4", "--seed=7"),
        "config.seed: got 7, the run has 0; config.skill.rank: got 4, the run has 8",
    ),
    "a workdir of other files": (
        (
            "launch.expand",
            *TINY,
            "--workdir=lib",
            "--library=lib",
            "--name=new",
            WALKER,
        ),
        "holds base but no config.json",
    ),
    "a workdir that is a file": (
        ("launch.expand", *TINY, "--workdir=walker.hdf5", "--library=lib", "--name=new")
        + (WALKER,),
        "cannot make workdir",
    ),
    "no workdir": (("launch.pretrain", *TINY, WALKER), "--workdir"),
    "no name": (("launch.expand", *TINY, "--workdir=new", WALKER), "--name"),
    "a flag that is not there": ((*PRETRAIN, "--dada=x"), "dada"),
    "an argument": ((*PRETRAIN, "walker.hdf5"), "unexpected argument 'walker.hdf5'"),
    "an output that is a folder": ((*EVALUATE, "--out=folder"), "folder"),
    "an output under a file": ((*EVALUATE, "--out=walker.hdf5/a.json"), "walker.hdf5"),
    "a collection that is there": (
        (*COLLECT, "--out=walker.hdf5", "--policy=random"),
        "walker.hdf5: holds another collection",
    ),
    "a collection that is damaged": (
        (*COLLECT, "--out=truncated.hdf5"),
        "truncated.hdf5: not a readable HDF5 file",
    ),
    "a base is not removed": (
        ("launch.library", "remove", "base", "--library=lib"),
        "cannot remove a base",
    ),
    "a skill that is needed": (
        ("launch.library", "remove", "walk", "--library=lib"),
        "skill 'walk' is needed by gate 'gate'; remove that first",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    command, words = FORMS[name]
    refused(words, *command)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def edit(path):
    path.write_text(path.read_text().replace('"created"', '"Created"'))


DAMAGE = [("base", "base"), ("skills/walk", "skill"), ("gates/gate", "gate")]
DAMAGED = [
    (f"{folder}/{kind}.{suffix}", damage)
    for folder, kind in DAMAGE
    for suffix, damage in (
        ("safetensors", cut),
        ("safetensors", os.remove),
        ("json", cut),
        ("json", edit),
    )
]


def damage_name(value):
    """Ids alike in every process: a function's text holds its address."""
    return value if isinstance(value, str) else value.__name__


@pytest.mark.parametrize(("file", "damage"), DAMAGED, ids=damage_name)
def test_library_damaged_by_hand(file, damage):
    shutil.rmtree("damaged", ignore_errors=True)
    shutil.copytree("lib", "damaged")
    damage(Path("damaged", file))
    try:
        refused(
            file, "launch.evaluate", "--library=damaged", *EVALUATE[2:], "--gate=gate"
        )
        answer = call("launch.library", "verify", "--library=damaged")
        assert answer.code == 2 and file in answer.out
        assert answer.err.startswith("error: damaged: ") and answer.err.count("\n") == 1
        assert call("launch.library", "list", "--library=damaged").code in (0, 2)
    finally:
        shutil.rmtree("damaged")


def test_a_start_of_another_base():
    """Copied from another library, as nothing else makes such a gate."""
    other = ("--library=other", WALKER, "--noevaluate", *TINY)
    assert call("launch.pretrain", "--workdir=base2", "--seed=1", *other).code == 0
    try:
        walk = ("launch.expand", "--workdir=walk2", "--name=walk")
        assert call(*walk, *other).code == 0
        shutil.copytree("lib/gates", "other/gates")
        refused(
            "gate 'linear': made for base",
            *("launch.compose", *other, "--workdir=new", "--name=new"),
            *("--start=linear", "--skills=walk"),
        )
    finally:
        for folder in ("other", "base2", "walk2"):
            shutil.rmtree(folder, ignore_errors=True)


def test_damaged_base_stops_a_stage():
    shutil.copytree("lib", "damaged")
    cut(Path("damaged/base/base.safetensors"))
    try:
        command = ("launch.expand", *TINY, "--workdir=new", "--library=damaged", WALKER)
        refused("base.safetensors: SHA-256 is", *command, "--name=new")
        command = (
            "launch.compose",
            *TINY,
            "--workdir=new",
            "--library=damaged",
            WALKER,
        )
        refused("base.safetensors: SHA-256 is", *command, "--name=new", "--skills=walk")
    finally:
        shutil.rmtree("damaged")


HOLD = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_on_one_workdir():
    command = ("launch.expand", *TINY, "--library=lib", "--name=held", WALKER)
    command += ("--workdir=held", "--noevaluate", "--config.skill.learning_rate=1e30")
    assert call(*command, "--config.run.log_every=1").code == 1  # an unfinished run
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, "held/.lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout.readline() == "held\n"
        refused("is in use by another process", *command)


def test_loss_that_is_not_finite():
    before = files("lib")
    run = ("--config.run.log_every=2", "--config.run.save_every=1")
    command = ("launch.expand", *TINY, "--library=lib", "--name=wild", WALKER)
    command += ("--workdir=wild", "--noevaluate", *run)
    command += ("--config.skill.learning_rate=1e30", "--config.skill.steps=6")
    answer = call(*command)
    assert answer.code == 1
    *_, last = answer.err.splitlines()
    assert last == (
        "error: loss/skill is not finite between steps 0 and 2; last good save: step 1"
    )
    assert answer.err.count("error") == 1 and answer.out == ""
    assert [p.name for p in Path("wild/checkpoints").iterdir()] == ["1"]
    assert not Path("wild/result.json").exists()
    assert files("lib") == before


def test_policy_that_is_not_finite():
    evaluate = (
        "launch.evaluate",
        "--library=lib",
        f"--env={short.SPEC.format('walk')}",
    )
    answer = call(*evaluate, "--skills=walk", "--alpha=1e38", "--episodes=1")
    assert answer.code == 1 and answer.err.count("\n") == 1
    assert answer.err.startswith("error: the policy's action is not finite in step 0")
