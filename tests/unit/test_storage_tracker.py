"""The tracker counts exact bytes: what comes and goes, who is alive at the peak; on host and fake GPU."""

import pytest
import torch
from torch import nn

from msa_train.plan.trace import parts
from msa_train.plan.trace.cuda_names import DEVICE
from msa_train.plan.trace.fake_device import FakeDevice, HostReadError
from msa_train.plan.trace.storage_tracker import StorageTracker

KIB = 1024


def other(_lines: list[str]) -> str:
    return parts.OTHER


def test_counts_what_comes_and_goes() -> None:
    with StorageTracker(other) as tracker:
        a = torch.empty(KIB, dtype=torch.float32)
        assert tracker.host_current == 4 * KIB
        b = a.view(2, -1).t()
        assert tracker.host_current == 4 * KIB, "views share their storage"
        c = a + 1
        assert tracker.host_current == 8 * KIB
        del a, c
        assert tracker.host_current == 4 * KIB, "a view keeps the storage alive"
        del b
        assert tracker.host_current == 0
        assert tracker.host_peak.num_bytes == 8 * KIB
        assert sum(entry.num_bytes for entry in tracker.host_peak.entries) == 8 * KIB


def test_rounds_as_the_allocator_of_cuda_does() -> None:
    with StorageTracker(other) as tracker:
        kept = [torch.empty(1), torch.empty(129)]
        assert tracker.host_current == 512 + 1024
        del kept


def test_peak_of_a_step_on_the_fake_device() -> None:
    """Two matrices 256 x 256: activations, their gradients and the weights' are all there is."""
    size = 4 * 256 * 256
    with FakeDevice(other) as device:
        weights = [torch.empty(256, 256, device="cuda", requires_grad=True) for _ in range(2)]
        x = torch.empty(256, 256, device="cuda")
        device.reset_peak()
        assert device.current == 3 * size
        hidden = x @ weights[0]
        loss = (hidden @ weights[1]).sum()
        assert device.current == 4 * size + 512, "the last product is not kept by a sum"
        loss.backward()
        del loss, hidden
        assert device.current == 5 * size, "weights, input, gradients"
        # weights, input, hidden; gradients of the second weight, of hidden, of the first; loss and its own
        assert device.peak.num_bytes == 7 * size + 2 * 512
        assert device.host_current == 0


def test_device_is_a_gpu_to_python_and_its_numbers_are_unknown() -> None:
    with FakeDevice(other) as device:
        x = torch.ones(8, device="cuda")
        assert x.is_cuda
        assert x.device == DEVICE
        assert x.to("cuda") is x
        assert x.new_empty(3).device == DEVICE
        assert x.type() == "torch.cuda.FloatTensor"
        # losses and norms are finite
        assert float(x.sum()) == 1.0
        assert bool(x.isfinite().all())
        with pytest.raises(HostReadError, match="reads an integer"):
            int((x > 0).sum())
        host = x.cpu()
        assert host.device.type == "cpu"
        # the host's own tensors are real
        assert torch.arange(4).tolist() == [0, 1, 2, 3]
        assert device.host_current == 512
        module = nn.Linear(4, 4, device="cuda").bfloat16()
        assert module.weight.dtype is torch.bfloat16
    assert torch.cuda.is_available() == (torch.version.cuda is not None and torch.cuda.device_count() > 0)


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (["layers/moe.py:158:token_dispatch", "moe/moe_layer.py:1:forward"], parts.MOE),
        (["layers/norm.py:35:forward", "recompute"], parts.RECOMPUTE),
        (["comm/cp_comm.py:99:start_all_gather", "attention/msa.py:130:start"], parts.INDEX_KEYS),
        (["layers/cross_entropy.py:72:backward"], parts.LOGITS),
        ([], parts.OTHER),
    ],
)
def test_source_lines_name_the_part(lines: list[str], part: str) -> None:
    assert parts.part_of(lines) == part
