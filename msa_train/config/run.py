"""Describe everything about a run apart from the model's shape."""

from dataclasses import dataclass, field
from typing import Any

from msa_train.config.deepspeed.settings import DeepSpeedConfig
from msa_train.config.evaluation.settings import EvaluationConfig
from msa_train.config.model import AttentionConfig, ModelConfig
from msa_train.config.options import (
    BadStep,
    CpLayout,
    Device,
    EngineKind,
    Fusion,
    GradsDtype,
    KvExchange,
    LrSchedule,
    MoeDispatcher,
    MomentsDtype,
    OptimizerKind,
    Precision,
    Progress,
    Recompute,
    SaveFailure,
)
from msa_train.config.stages import StageConfig


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """Size the process groups. Data parallelism takes what remains of the world.

    Example: 64 ranks with tp 2, pp 2 and cp 4 -> 64 / 16 = 4 data-parallel ranks.
    """

    cp_size: int = 1
    "context parallelism: ranks that share one sequence"
    cp_head_size: int = 1
    "Ulysses degree: neighbours that trade tokens for KV heads; divides cp_size and model.num_kv_heads"
    ep_size: int = 1
    "expert parallelism: ranks that share the experts; may span context and data parallel ranks"
    moe_dispatcher: MoeDispatcher = MoeDispatcher.alltoall
    "how rows travel between the ranks that share the experts"
    tp_size: int = 1
    "tensor parallelism (with sequence parallelism); engine=megatron only"
    pp_size: int = 1
    "pipeline parallelism; engine=megatron only"
    pp_layout: str = "even"
    "layers of each stage: even, auto (by their prices), or numbers; k * pp_size numbers interleave k chunks"
    cp_layout: CpLayout = CpLayout.contiguous
    "which tokens a context-parallel rank holds"
    kv_exchange: KvExchange = KvExchange.selected
    "how keys and values of other context-parallel ranks come to the queries"
    balance_index: bool = True
    "queries of the block selection move to ranks with less of it"
    balance_full_attention: bool = True
    "queries of full attention move to ranks with less of it; with a ring, keys and values may too"
    overlap_grad_reduce: bool = False
    "reduce gradients while the backward pass still runs; engine=megatron only"
    overlap_param_gather: bool = False
    "gather updated parameters under the next forward pass; needs overlap_grad_reduce; engine=megatron only"


@dataclass(kw_only=True, slots=True)
class ExchangeConfig:
    """Tune how keys and values travel between context-parallel ranks; see also parallel.kv_exchange."""

    overlap: bool = True
    "compute while they travel; false only changes when a rank waits, never a result"
    keep_for_backward: bool = True
    "keep fetched KV blocks for the backward pass; false: fetch them again (selected, auto)"
    ranks_per_node: int = 0
    "context-parallel ranks of a node: what several want is fetched once; 0: no nodes, -1: find out"
    hot_share: float = 0.75
    "KV blocks that this share of the others (at least 3) wants are broadcast if that helps; 0: none"
    query_slices: int = 0
    "slices of queries: what one selected travels while the next is scored; 0: 1 to 4 by length, 1: one piece"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Name the text, and say how it becomes sequences."""

    corpus: str = "stdlib"
    "'stdlib' (source files of this Python), or a file, folder or glob of text, JSONL or Megatron .bin/.idx"
    mixture: dict[str, Any] = field(default_factory=dict[str, Any])
    "in place of corpus: sources by name, each {corpus: PATH, weight: 1, buckets: {128K-512K: 1}}"
    tokenizer: str = "bytes"
    "'bytes', or the path of a tokenizer.json"
    special_tokens: bool = False
    "special tokens written in a text stand for what they name; false: they are text, and counted"
    max_unknown: float = 0.01
    "largest share of unknown tokens or lost characters with which a tokenizer is accepted"
    text_field: str = "text"
    "key of the text in JSONL records"
    seq_len: int = 8192
    "tokens of one pack, padding included; split over the context-parallel ranks"
    validation_fraction: float = 0.05
    "share of documents held out, chosen by a hash of the document's name"
    seed: int = 1234
    "order of documents"
    cache_dir: str = "~/.cache/msa_train"
    "tokenized corpora are kept here and found again"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Set the optimizer and its learning rate."""

    algorithm: OptimizerKind = OptimizerKind.adamw
    "how weights are updated"
    lr: float = 3e-4
    "peak learning rate"
    muon_lr: float = 0.02
    "learning rate of the matrices that Muon updates; follows the same schedule as lr"
    muon_momentum: float = 0.95
    "momentum of Muon"
    min_lr_ratio: float = 0.1
    "final learning rate as a share of lr"
    schedule: LrSchedule = LrSchedule.cosine
    "shape of the learning rate after the warm-up"
    schedule_steps: int = 0
    "steps over which it goes, at its last value from then on; 0: those of the whole run"
    warmup_steps: int = 100
    "first steps, over which the learning rate rises from 0"
    decay_fraction: float = 0.2
    "share of the steps over which wsd decays"
    weight_decay: float = 0.1
    "weight decay of the backbone's matrices"
    index_lr_scale: float = 1.0
    "learning rate of the index branch relative to lr and muon_lr"
    index_weight_decay: float = 0.1
    "weight decay of the index branch's matrices"
    beta1: float = 0.9
    "AdamW: decay of the first moment"
    beta2: float = 0.95
    "AdamW: decay of the second moment"
    eps: float = 1e-8
    "AdamW: added to the root of the second moment"
    clip_grad: float = 1.0
    "maximum of the global gradient norm; 0 switches clipping off"
    moments_dtype: MomentsDtype = MomentsDtype.fp32
    "AdamW: dtype of the two moments between steps"
    grads_dtype: GradsDtype = GradsDtype.fp32
    "dtype of the gradient buffer; norm, clipping and update are in fp32 anyway"
    offload: float = 0.0
    "AdamW: share of fp32 weights and moments kept in host memory and streamed through the update"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Set length and arithmetic of the training."""

    steps: int = 100
    "optimizer steps of the whole run; 0: as many as the stages have"
    global_batch_size: int = 1
    "packs per optimizer step over all data-parallel ranks and accumulation"
    precision: Precision = Precision.bf16
    "dtype of parameters and activations; optimizer state is at least fp32"
    recompute: Recompute = Recompute.none
    "what is computed again in the backward pass instead of being kept"
    recompute_modules: str = "experts,ffn,norm"
    "for selective, comma-separated: attention (without projections), experts, ffn (dense layers), norm"
    recompute_stages: str = ""
    "recompute of each pipeline rank, as `full,selective,none,none`; empty: the same in all"
    fusion: Fusion = Fusion.auto
    "norm, rotary embedding with head norm, gates, router and softmax of the loss as one kernel each"
    offload_activations: bool = False
    "what layers keep for the backward pass waits in host memory and returns one layer ahead"
    tile_tokens: int = 0
    "tokens of a rank that experts and feed-forward layers take at once, recomputed; 0: all, kept"
    deterministic: bool = False
    "the same bits in every run on the same GPUs, at a cost; on CPUs they are the same anyway"
    validate_every: int = 100
    "steps between validations; 0 for none"
    validation_packs: int = 8
    "packs of held-out documents per validation"
    seed: int = 1234
    "initial weights"
    bad_step: BadStep = BadStep.end
    "what is done about a step whose loss or gradient is not finite, or whose loss is a spike"
    max_skipped: int = 5
    "bad steps in a row at which bad_step=skip ends the run and bad_step=rollback goes back"
    max_rollbacks: int = 3
    "how often bad_step=rollback may go back before the run ends"
    spike_factor: float = 0.0
    "a loss above this times the median of the last spike_window losses is a spike; 0: none is"
    spike_window: int = 50
    "recent losses whose median a spike is measured by"


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Say when checkpoints are written and from where a run starts."""

    every: int = 100
    "steps between checkpoints; one more is written after the last step; 0 for none at all"
    keep_last: int = 2
    "older checkpoints are removed; 0 keeps all"
    keep_every: int = 0
    "checkpoints of steps that are multiples of this are never removed; 0: none is spared"
    keep_stage_ends: bool = True
    "nor are those with which a stage ends and another begins"
    asynchronous: bool = True
    "write beside the training, which pauses only for a copy in host memory; false: it waits"
    retries: int = 0
    "how often a write that failed is tried again from the same copy"
    on_failure: SaveFailure = SaveFailure.end
    "when a write has failed for good; the last checkpoint of a run must succeed"
    load: str = ""
    "run_dir or checkpoint folder to start from when run_dir has none; any parallel layout"
    load_weights_only: bool = False
    "take weights alone from `load` and begin at step 0; an index branch that it lacks is drawn anew"
    accept_other_data: bool = False
    "go on although corpus, tokenizer, validation_fraction, seed or batch size are not the checkpoint's"


@dataclass(kw_only=True, slots=True)
class LoggingConfig:
    """Say what is written while training."""

    every: int = 1
    "steps between entries of metrics.jsonl and TensorBoard"
    attention_every: int = 10
    "steps between comparisons of the selection of MSA layers with full attention; 0 for none"
    attention_queries: int = 64
    "queries of the compared step's first pack that are looked at"
    selections_every: int = 0
    "steps between recordings of what the first pack selects, in run_dir/selections; 0 for none"
    tensorboard: bool = True
    "write run_dir/tensorboard too"
    progress: Progress = Progress.auto
    "how the training loop reports on the terminal"


@dataclass(kw_only=True, slots=True)
class LauncherConfig:
    """Set the local worker processes."""

    num_processes: int = 0
    "workers on this machine; 0: one per GPU, or 2 without GPUs; ignored under torchrun and srun"
    device: Device = Device.auto
    "where the workers compute"
    threads_per_process: int = 1
    "CPU threads of a worker"
    timeout_s: int = 600
    "longest wait for another rank, in seconds, before the job is taken down"


@dataclass(kw_only=True, slots=True)
class WatchdogConfig:
    """Say when a run that makes no progress is given up."""

    timeout_s: int = 1800
    "longest time in which no pack, step or checkpoint begins or ends; then ranks log their stacks; 0: any"


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Describe one training run."""

    name: str = "unnamed"
    "of the run"
    run_dir: str = "runs/unnamed"
    "checkpoints, metrics, logs; runs/NAME in all shipped runs; a run goes on where its run_dir stopped"
    engine: EngineKind = EngineKind.auto
    "who owns gradient reduction, optimizer and schedule"
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict[str, StageConfig])
    "by name, in order; none: sparse attention for train.steps"
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
