"""Say to which part of a step a tensor belongs, by the source line that made it."""

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
KEPT, RECOMPUTE, BACKWARD = "kept activations", "recompute", "backward"
INDEX_KEYS, FETCHED, ATTENTION, MOE = "index keys", "fetched K/V", "attention", "MoE buffers"
LOGITS, COMMUNICATION, STAGING, OTHER = "logits", "communication buffers", "checkpoint staging", "other"
PARTS = (
    WEIGHTS, GRADIENTS, OPTIMIZER, KEPT, RECOMPUTE, BACKWARD, INDEX_KEYS, FETCHED, ATTENTION, MOE,
    LOGITS, COMMUNICATION, STAGING, OTHER,
)  # fmt: skip

# First match of the innermost lines wins: file, and function or nothing.
_BY_FILE = (
    ("model/attention/index_branch.py", INDEX_KEYS),
    ("attention/index_branch.py", INDEX_KEYS),
    ("attention/msa.py:start", INDEX_KEYS),
    ("kv_exchange/", FETCHED),
    ("parallel/attention/", ATTENTION),
    ("attention/cp_sparse.py", ATTENTION),
    ("attention/cp_full.py", ATTENTION),
    ("block_sparse_attention/", ATTENTION),
    ("select_blocks/", ATTENTION),
    ("full_attention/", ATTENTION),
    ("triton/", ATTENTION),
    ("layers/moe", MOE),
    ("moe/", MOE),
    ("layers/cross_entropy.py", LOGITS),
    ("distributed/param_and_grad_buffer.py", COMMUNICATION),
    ("optimizer/", OPTIMIZER),
    ("optim/", OPTIMIZER),
    ("pipeline_parallel/", COMMUNICATION),
    ("dist_checkpointing/", STAGING),
    ("torch_dist/", STAGING),
    ("checkpoint/", STAGING),
    ("sharding/", ATTENTION),
)


def part_of(lines: list[str]) -> str:
    """Name the part of a new tensor.

    Args:
        lines: `storage_tracker.source_lines`.

    Example: ["layers/moe.py:158:token_dispatch", ...] -> "MoE buffers".
    """
    for line in lines:
        if line == "recompute":
            continue
        file, _, rest = line.partition(":")
        function = rest.partition(":")[2]
        for key, part in _BY_FILE:
            name, _, wanted = key.partition(":")
            if name in file and (not wanted or wanted == function):
                return part
        # lines further out say less: a norm called by an expert layer belongs to the norm
        if file.endswith(("cp_comm.py", "p2p.py", "to_device.py", "collectives.py")):
            continue
        break
    if any(line == "recompute" for line in lines):
        return RECOMPUTE
    if any("forward" in line.rpartition(":")[2] for line in lines):
        return KEPT
    return OTHER
