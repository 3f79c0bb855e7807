"""Name the choices that a user can make. Values are what is written in YAML and on the command line."""

from enum import Enum


class EngineKind(Enum):
    """Choose who owns gradient reduction, optimizer and schedule."""

    auto = "auto"  # megatron with GPUs, torch without
    megatron = "megatron"  # Megatron's DDP, distributed optimizer, tensor and pipeline parallelism
    torch = "torch"  # gradient all-reduce and torch.optim.AdamW; any device
    deepspeed = "deepspeed"  # ZeRO 0 to 3 with offload, see deepspeed.*; any device


class Device(Enum):
    """Choose the devices that the workers compute on."""

    auto = "auto"  # GPUs where there are any
    cpu = "cpu"  # GPUs are left alone
    cuda = "cuda"  # GPUs; it is an error if there are none


class KvExchange(Enum):
    """Choose how a layer gets the keys and values of other context-parallel ranks."""

    selected = "selected"  # only the KV blocks that a local query selected
    all_gather = "all_gather"  # all keys and values, gathered; gradients reduce-scattered
    ring = "ring"  # one neighbour's shard at a time, partial results merged by log-sum-exp
    auto = "auto"  # selected or all_gather, for each call of a layer what measured rates say


class AttentionKernel(Enum):
    """Choose what computes block selection, sparse attention and its KL loss, for MSA and sliding windows."""

    auto = "auto"  # triton on GPUs, where it is installed and has tiles for the shape; else cpu
    triton = "triton"  # GPUs; fp32, fp16, bf16
    cpu = "cpu"  # tiles in torch; any device and dtype
    reference = "reference"  # plain definitions, slow: to compare with


class FullKernel(Enum):
    """Choose the library whose kernel computes full attention."""

    auto = "auto"  # the fastest that is installed and works on the device
    flash3 = "flash3"  # FlashAttention 3: Hopper GPUs; fp16, bf16
    flash2 = "flash2"  # package flash-attn: fp16, bf16
    cudnn = "cudnn"  # cuDNN through torch; fp16, bf16
    torch = "torch"  # torch's own: any device and dtype


class CpLayout(Enum):
    """Choose the tokens of a sequence that a context-parallel rank holds.

    Example: 16 tokens in blocks of 2 on 2 ranks: contiguous gives rank 0 tokens 0-7, zigzag 0-3 and 12-15.
    """

    contiguous = "contiguous"  # one run of tokens: few remote blocks are selected
    zigzag = "zigzag"  # two of 2 * cp_size chunks, r and 2 * cp_size - 1 - r
    dealt = "dealt"  # chunks of 1,024 tokens, dealt so that causal work is equal


class Precision(Enum):
    """Choose the dtype of the model's parameters and activations; optimizer state is at least fp32."""

    fp32 = "fp32"  # 32 bits
    bf16 = "bf16"  # 16 bits; fp32 weights are kept by the optimizer
    fp64 = "fp64"  # for exactness tests


class Recompute(Enum):
    """Choose what is computed again in the backward pass instead of being kept."""

    none = "none"  # nothing
    selective = "selective"  # the parts of a layer that train.recompute_modules names
    full = "full"  # every transformer layer; the block selection is replayed, not repeated


class Fusion(Enum):
    """Choose whether norms, rotary embedding, gates, router and softmax of the loss are one kernel each."""

    auto = "auto"  # compiled on GPUs
    none = "none"  # operators of torch, one after the other
    compile = "compile"  # by torch.compile; on CPUs it needs a C++ compiler, and a minute at the first start


class Implementation(Enum):
    """Choose whose linear layers and norms the model is built of."""

    torch = "torch"  # Megatron's linear layers in torch, our norm
    transformer_engine = "transformer_engine"  # NVIDIA's, where the transformer-engine package is installed


class MoeDispatcher(Enum):
    """Choose how rows travel between the ranks that share the experts."""

    alltoall = "alltoall"  # messages of torch.distributed, the shared expert and other tiles beside them
    deepep = "deepep"  # DeepEP's kernels, where the deep_ep package is installed; a token goes to a rank once


class OptimizerKind(Enum):
    """Choose how weights are updated."""

    adamw = "adamw"  # every engine
    muon = "muon"  # orthogonalised momentum for the layers' matrices, AdamW for the rest; engine=torch


class Offload(Enum):
    """Choose where engine=deepspeed keeps what a rank does not compute with."""

    none = "none"  # on the device
    cpu = "cpu"  # in host memory
    nvme = "nvme"  # on a disk, at deepspeed.nvme_path, with zero_stage=3


class MomentsDtype(Enum):
    """Choose the dtype in which AdamW keeps its two moments between steps; it computes in fp32."""

    fp32 = "fp32"  # 8 bytes per parameter; fp64 for fp64 parameters
    bf16 = "bf16"  # 4 bytes, rounded stochastically
    fp8 = "fp8"  # 2 bytes, e4m3 with a scale per 256 values; the second moment as its square root


class GradsDtype(Enum):
    """Choose the dtype of the buffer in which gradients are added up over micro-batches."""

    fp32 = "fp32"  # 4 bytes per parameter of a rank; fp64 for fp64 parameters
    bf16 = "bf16"  # 2 bytes; sums over micro-batches and ranks are made in fp32 and rounded stochastically


class LrSchedule(Enum):
    """Choose the shape of the learning rate after the warm-up."""

    cosine = "cosine"  # half a cosine down to min_lr_ratio
    wsd = "wsd"  # constant, then linear decay over the last `decay_fraction`
    constant = "constant"  # as it is


class RopeType(Enum):
    """Choose how the frequencies of the rotary embedding are scaled for longer sequences."""

    default = "default"  # not at all
    linear = "linear"  # all divided by the factor
    ntk = "ntk"  # theta times factor^(d / (d - 2)) for d rotated channels, whatever a sequence's length
    yarn = "yarn"  # slow ones divided by the factor, fast ones kept, a ramp between; sine and cosine grow


class StageRope(Enum):
    """Choose the rotary embedding's scaling in a stage."""

    model = "model"  # model.rope_type
    default = "default"  # none
    linear = "linear"  # as model.rope_type=linear, and so on
    ntk = "ntk"
    yarn = "yarn"


class QkNorm(Enum):
    """Choose the RMS normalisation of queries and keys before the rotary embedding."""

    none = "none"  # no normalisation
    head = "head"  # one weight of head_dim, shared by the heads (M3)
    width = "width"  # one weight over all heads together (M2)


class Activation(Enum):
    """Choose the gated activation of feed-forward layers and experts."""

    swiglu = "swiglu"  # up * silu(gate)
    swiglu_oai = "swiglu_oai"  # (clamp(up, +-7) + 1) * g * sigmoid(1.702 g), g = min(gate, 7)


class AttentionKind(Enum):
    """Choose the attention of one layer."""

    full = "full"  # everything before a token in its document
    msa = "msa"  # the blocks that an index branch selects
    swa = "swa"  # sliding window of `attention.window` tokens and, if wanted, the document's first blocks


class StageAttention(Enum):
    """Choose what the main branch of MSA layers attends to in a stage."""

    sparse = "sparse"  # the selected blocks
    dense = "dense"  # everything before a token in its document; the index branch may learn, selects nothing


class StageSchedule(Enum):
    """Choose the shape of the learning rate within a stage, after its `warmup_steps`."""

    run = "run"  # optim.schedule over the whole run
    constant = "constant"  # the same rate to the stage's end
    linear = "linear"  # falls evenly to min_lr_ratio of it at the stage's end
    cosine = "cosine"  # falls to that along half a cosine


class StageRecompute(Enum):
    """Choose what is computed again in the backward pass of a stage."""

    run = "run"  # train.recompute and train.recompute_stages
    none = "none"  # as train.recompute=none, and so on
    selective = "selective"
    full = "full"


class KlTarget(Enum):
    """Choose the tokens over which the KL loss compares the index branch with the main branch."""

    auto = "auto"  # causal with dense attention, selected with sparse attention
    causal = "causal"  # all tokens up to the query in its document
    selected = "selected"  # those of the selected blocks
    none = "none"  # no KL loss: the index branch gets no gradient


class BadStep(Enum):
    """Choose what is done about a step whose loss or gradient is not finite, or whose loss is a spike."""

    end = "end"  # the run ends before the step is saved
    skip = "skip"  # weights stay as they are, data moves on; too many in a row end the run
    rollback = "rollback"  # the same, but too many in a row take the run back to its last checkpoint


class SaveFailure(Enum):
    """Choose what becomes of a run whose checkpoint could not be written."""

    end = "end"  # it ends with the cause
    go_on = "go_on"  # it says so and trains on; the next checkpoint is tried when it is due


class Progress(Enum):
    """Choose how the training loop reports on the terminal."""

    auto = "auto"  # a bar on a terminal, lines otherwise
    bar = "bar"  # a bar
    lines = "lines"  # a line every few seconds
