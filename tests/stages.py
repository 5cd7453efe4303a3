"""One run of each workflow, given a command's config and the fields of its request."""

from psec_jax.workflows import Job, base, critics, gate, skill


def job(config):
    return Job.from_dict(config.to_dict())


def pretrain(config, **fields):
    return base.run(job(config), base.Request(**fields))[0]


def expand(config, **fields):
    return skill.run(job(config), skill.Request(**fields))[0]


def compose(config, **fields):
    return gate.run(job(config), gate.Request(**fields))[0]


def train_critics(config, **fields):
    return critics.run(job(config), critics.Request(**fields))[0]
