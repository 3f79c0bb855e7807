"""Hold the runs of the extension benchmark: what each differs in, and what it begins from.

extend_mini        the run that ships, on two processes; its last two stages begin where others begin, too
short_*            from the end of its stage full: full attention or a window in all layers, at 2K
long_*             from the end of its stage short, or from one of these: 10K, with one thing changed
"""

from dataclasses import dataclass
from pathlib import Path

from launchers.hydra_config.compose import load_run
from msa_train.config import plan_stages

SHORT, LONG = 2048, 10240
"tokens of a sequence before and after the extension"
SHORT_STEPS, LONG_STEPS = 600, 120
"of two sequences at the short length, as many as extend_mini's stages index and short; of a long one"
WINDOW = 256
"tokens that a windowed layer sees"
MINI = "extend_mini"
STUDIED = "long_msa"
"run whose selection is replaced by other rules"

_ONE_PROCESS = ("parallel.cp_size=1", "parallel.ep_size=1", "launcher.num_processes=1")
_LONG_RATES = ("optim.lr=4e-3", "optim.muon_lr=0.0133", "optim.warmup_steps=4")
MINI_ROPE = ("model.rope_type=yarn", "model.rope_factor=5", f"model.rope_original_length={SHORT}")
"of the last stage of extend_mini"
NEEDLES = ("niah_single_1", "niah_single_2", "niah_multikey_1")
UNORDERED = ("vt", "fwe", "cwe")
"tasks over many places; several answers, so there are no hits"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Describe one training run, in one process, and its evaluation."""

    name: str
    "of its folder and its row in the tables"
    what: str
    "in words"
    settings: tuple[str, ...]
    "of msa-train beside the common ones"
    after: str
    "run whose weights it begins from, or `MINI`"
    stage: str = ""
    "of MINI, at whose end"
    model: tuple[str, ...] = ()
    "settings that its evaluation needs too"
    command: str = "launchers.train"
    "module that trains"
    environment: tuple[tuple[str, str], ...] = ()
    "variables for it"


def _attention(kind: str) -> tuple[str, ...]:
    # the checkpoint has index branches; layers of other kinds leave them
    return () if kind == "msa" else (f"model.layer_attention={kind}", f"attention.window={WINDOW}")


def _mixture(*, long: float, short: float, text: float) -> tuple[str, ...]:
    """Weigh documents of 10K and of 2K that teach to look back, and running text."""
    return (
        "data.mixture.first.weight=0",
        f"data.mixture.recall.weight={long + short}",
        f"data.mixture.recall.buckets={{8K-32K:{long},under_8K:{short}}}",
        f"data.mixture.text.weight={text}",
    )


def _short(kind: str, what: str) -> Run:
    """Go on at the short length, as extend_mini does, with another kind of attention in all layers."""
    return Run(
        name=f"short_{kind}",
        what=what,
        after=MINI,
        stage="full",
        settings=(
            f"data.seq_len={SHORT}",
            f"evaluation.lengths={SHORT}",
            "train.global_batch_size=2",
            f"train.steps={SHORT_STEPS}",
        ),
        model=_attention(kind),
    )


_LONG_MIXTURE = _mixture(long=3, short=0.3, text=0.5)
"that of extend_mini's stage long"


def _long(
    name: str,
    what: str,
    *,
    kind: str = "msa",
    rope: tuple[str, ...] = MINI_ROPE,
    mixture: tuple[str, ...] = _LONG_MIXTURE,
    command: str = "launchers.train",
    environment: tuple[tuple[str, str], ...] = (),
) -> Run:
    """Go on at the long length from the short run of a kind."""
    return Run(
        name=f"long_{name}",
        what=what,
        after=MINI if kind == "msa" else f"short_{kind}",
        stage="short" if kind == "msa" else "",
        settings=(
            *mixture,
            *_LONG_RATES,
            f"data.seq_len={LONG}",
            "train.global_batch_size=1",
            f"train.steps={LONG_STEPS}",
        ),
        model=(*_attention(kind), *rope),
        command=command,
        environment=environment,
    )


RUNS = (
    _short("full", "full attention in all layers"),
    _short("swa", "a window of 256 tokens in all layers"),
    _long("msa", "MSA, yarn, factor 5"),
    _long("full", "full attention, yarn, factor 5", kind="full"),
    _long("swa", "a window of 256 tokens, yarn, factor 5", kind="swa"),
    _long("default", "rotary embedding unchanged", rope=()),
    _long("ntk", "theta 6.3 times larger (ntk)", rope=("model.rope_type=ntk", "model.rope_factor=5")),
    _long("linear", "positions divided by 5", rope=("model.rope_type=linear", "model.rope_factor=5")),
    _long("no_short", "long documents of recall alone", mixture=_mixture(long=1, short=0, text=0)),
    _long("text_only", "running text alone", mixture=(*_LONG_MIXTURE, "data.mixture.recall.weight=0")),
    _long(
        "near",
        "a loss that draws the queries of a rank to the same blocks",
        command="benchmarks.extension.locality_loss",
        environment=(("MSA_TRAIN_LOCALITY_WEIGHT", "0.3"),),
    ),
)


def stage_end(runs: str, stage: str) -> str:
    """Return the path of the checkpoint of the run that ships at the end of a stage."""
    folder = Path(runs, MINI)
    stages = plan_stages(load_run(str(folder / "config.yaml")))
    step = next(one.last_step for one in stages if one.name == stage)
    return str(folder / "checkpoints" / f"step_{step:08d}")


def corpora(runs: str) -> dict[str, list[str]]:
    """Return the arguments of msa-data that write the documents, by source of the mixture."""
    first = ["--lengths", "256,512,1K", "--documents", "6000", "--seed", "3"]
    recall = ["--lengths", "2K,10K", "--documents", "900", "--seed", "4"]
    return {
        "first": ["synthesize", *first, "--output", f"{runs}/recall/first"],
        "recall": ["synthesize", *recall, "--output", f"{runs}/recall/longer"],
    }


def mini_training(runs: str) -> list[str]:
    """Return the settings of msa-train for the run that ships; all checkpoints of stages' ends stay."""
    return [
        *_common(runs, MINI),
        "checkpoint.keep_last=0",
        "evaluation.every=0",
        "logging.selections_every=100",
    ]


def training(run: Run, runs: str) -> list[str]:
    """Return the settings of msa-train."""
    begins = stage_end(runs, run.stage) if run.stage else f"{runs}/{run.after}"
    return [
        *_common(runs, run.name),
        *_ONE_PROCESS,
        "stages=single",
        *run.settings,
        *run.model,
        f"checkpoint.load={begins}",
        "checkpoint.load_weights_only=true",
        "evaluation.every=0",
        "checkpoint.every=1000000",
        "logging.selections_every=10",
    ]


def evaluation(
    runs: str,
    name: str,
    model: tuple[str, ...],
    *,
    load: str = "",
    samples: int = 20,
    tasks: tuple[str, ...] = (*NEEDLES, *UNORDERED),
    lengths: tuple[int, ...] = (SHORT, LONG),
) -> list[str]:
    """Return the settings of msa-eval: in packs of the long length, whatever the run was trained at."""
    return [
        *_common(runs, name),
        *_ONE_PROCESS,
        *model,
        "stages=single",
        f"data.seq_len={LONG}",
        "train.steps=1",
        f"evaluation.tasks={','.join(tasks)}",
        f"evaluation.lengths={','.join(str(length) for length in lengths)}",
        f"evaluation.samples={samples}",
        "evaluation.depths=10",
        "evaluation.held_out_packs=8",
        *((f"checkpoint.load={load}",) if load else ()),
    ]


def _common(runs: str, name: str) -> tuple[str, ...]:
    return (
        f"run={MINI}",
        f"run_dir={runs}/{name}",
        f"data.mixture.first.corpus={runs}/recall/first",
        f"data.mixture.recall.corpus={runs}/recall/longer",
    )
