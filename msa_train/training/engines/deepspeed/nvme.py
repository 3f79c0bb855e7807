"""Set up offload to NVMe for one rank: its folder, the buffers, and DeepSpeed's library for the disk.

DeepSpeed reads weights from files into buffers that are all as large as the largest slice of a parameter, and
fails where a layer has more parameters than there are buffers. A layer is gathered whole here, so there are
as many as two layers need, beside those of what is outside of the layers and stays for a whole pass.

By arithmetic for a dense 70B model in bf16 on 16 ranks: a layer has 7 matrices, the largest of 235M elements,
so 16 buffers of 29 MB. To compile the library before the first start:

    python -m msa_train.training.engines.deepspeed.nvme
"""

import copy
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from msa_train.config import printable
from msa_train.config.deepspeed.async_io import async_io_file
from msa_train.config.deepspeed.settings import DeepSpeedConfig
from msa_train.model.transformer_layer import MsaTransformerLayer
from msa_train.training.engines.deepspeed.swap_folder import SwapFolder

_OFFLOADS = ("offload_optimizer", "offload_param")


def own_folder(settings: DeepSpeedConfig) -> SwapFolder | None:
    """Make the folder of this rank's files, and build what reads and writes them; None without files.

    Raises:
        OSError: the folder cannot be written.
        ValueError: DeepSpeed's library cannot be built or loaded.
    """
    if not settings.uses_nvme:
        return None
    load_async_io()
    return SwapFolder(settings.nvme_path)


def load_async_io() -> Any:
    """Load DeepSpeed's library for the disk; at the first time on a machine it is compiled, some 5 minutes.

    Ranks of one machine wait for the one that compiles.

    Raises:
        ValueError: it cannot be compiled or loaded.
    """
    # Always the same ninja, that of the environment: another version would compile all of it again.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if not async_io_file().is_file():
        line = (
            "msa-train: compiling DeepSpeed's async_io for offload to NVMe, some minutes, once for a machine"
        )
        print(printable(line), file=sys.stderr, flush=True)
    from deepspeed.ops.op_builder import AsyncIOBuilder  # type: ignore[attr-defined]

    try:
        return AsyncIOBuilder().load(verbose=False)
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"deepspeed.offload_optimizer=nvme: DeepSpeed's async_io cannot be loaded ({text}); install "
            "libaio-dev, g++ and ninja, or use cpu"
        ) from error


@contextmanager
def weights_keep_their_dtype() -> Iterator[None]:
    """Let DeepSpeed cut weights, and move them to files, in the dtype that they have.

    On devices without fp16, such as CPUs, 0.19 takes all weights for bf16 where it makes buffers for files.
    """
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Init

    given = Init._set_dtype

    def keep(self: Any, config: Any, dtype: Any) -> None:
        given(self, config, dtype)
        self.dtype = dtype or self.dtype

    Init._set_dtype = keep  # type: ignore[method-assign]
    try:
        yield
    finally:
        Init._set_dtype = given


def json_of_rank(
    made: dict[str, Any], folder: SwapFolder | None, model: nn.Module, ranks: int
) -> dict[str, Any]:
    """Return DeepSpeed's JSON with this rank's folder, and with the buffers that its weights need.

    Args:
        made: by `deepspeed_json`; what `deepspeed.raw` says of buffers stays.
        folder: of this rank; None: the JSON stays as it is.
        model: whole, before DeepSpeed cuts it.
        ranks: that it is cut over.
    """
    if folder is None:
        return made
    own = copy.deepcopy(made)
    zero = own["zero_optimization"]
    for name in _OFFLOADS:
        if zero.get(name, {}).get("device") == "nvme":
            zero[name]["nvme_path"] = str(folder.path)
    if zero.get("offload_param", {}).get("device") == "nvme":
        count, size = weight_buffers(model, ranks)
        zero["offload_param"].setdefault("buffer_count", count)
        zero["offload_param"].setdefault("buffer_size", size)
    return own


def weight_buffers(model: nn.Module, ranks: int) -> tuple[int, int]:
    """Count the buffers that weights need, and the elements of each; see the module.

    Example: 32 layers of 7 matrices and 2 norms, an embedding, an output weight and a norm: 2 x 9 + 3 = 21.
    """
    layers = [module for module in model.modules() if isinstance(module, MsaTransformerLayer)]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    most = max((sum(1 for _ in layer.parameters()) for layer in layers), default=0)
    outside = sum(1 for parameter in model.parameters() if id(parameter) not in inside)
    largest = max(-(-parameter.numel() // ranks) for parameter in model.parameters())
    return 2 * most + outside, largest


if __name__ == "__main__":
    load_async_io()
