"""What the server of forked processes imports, see `fork_server`; importing this module imports all of it."""

import gc
import importlib
import warnings

# None of our own: the server has another search path, and some read the environment when they are imported.
MODULES = (
    "torch.distributed.checkpoint",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.rendezvous.registry",
    "torch.utils.tensorboard",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "hydra.core.override_parser.overrides_parser",
    "numpy.testing",
    "psutil",
    "pytest",
)


def _import_all() -> None:
    # nothing of it becomes garbage, which the collector would look for over and over
    gc.disable()
    with warnings.catch_warnings():
        # of absent optional packages
        warnings.simplefilter("ignore")
        for name in MODULES:
            importlib.import_module(name)
    # nor do forks look there: they would copy the pages
    gc.freeze()
    gc.enable()


_import_all()
