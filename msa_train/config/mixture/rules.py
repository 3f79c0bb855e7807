"""Check the mixture of a run and of its stages. Each failure is one ValueError line."""

from msa_train.config.mixture.settings import SourceWeight, read_sources, read_weights
from msa_train.config.run import RunConfig


def check_mixture(config: RunConfig) -> None:
    """Check names and weights; what the sources hold is looked at where they are prepared.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    stage_weights(config)


def stage_weights(config: RunConfig) -> dict[str, dict[str, SourceWeight]]:
    """Return the weights of every stage, planned or not, by its name and the source's; none if no mixture.

    A run without stages has the one that `plan_stages` calls main.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    sources = read_sources(config.data.mixture)
    given = {name: stage.mixture for name, stage in config.stages.items()} or {"main": {}}
    weights = {
        name: read_weights(sources, mixture, f"stages.{name}.mixture") for name, mixture in given.items()
    }
    return weights if sources else {}
