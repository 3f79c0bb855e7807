"""The CPU in the place of GPUs: `torch.device("cuda", n)`, `torch.cuda` and the backend nccl, without any.

What code that was never on a GPU gets wrong first shows here: tensors of the host beside tensors of the
device, tensors of the host given to NCCL, gaps in what is sent, memory read before it was written (it holds
NaN). It says nothing about streams, races, arithmetic of a GPU or speed: everything happens in order.

Ranks of a test: `run_ranks(..., device="pretended")`. All processes of a command:
`python -m tests.helpers.pretended_gpu.run COMMAND`.
"""
