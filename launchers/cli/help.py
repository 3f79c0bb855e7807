"""Write the text of --help from the configuration folder, so that a new file in conf/ is in it at once."""

from launchers.hydra_config.options import OPTION_GROUPS, group_options

USAGE = """\
msa-train run=NAME [GROUP=OPTION ...] [KEY=VALUE ...] [--check | --cfg]

Trains a model. Alone, it starts its own workers: one per GPU, or 2 on the CPU. Started by torchrun or by srun
it joins their job. Interrupted or started again, a run goes on from the last checkpoint in its run_dir."""

OPTIONS = """\
options:
  --check           check everything, the corpus and the checkpoint included, print one line, start nothing
  --cfg             print the resolved configuration as YAML, with every key, and stop
  --cfg=KEY         print the value of one key and stop, as in --cfg=run_dir
  --config-dir DIR  take options of the groups from DIR/model, DIR/run and so on, too; may be repeated
  --version         print the version and stop
  --help            print this text and stop"""

KEYS = {
    "run_dir=PATH": "checkpoints, logs and metrics; default runs/NAME",
    "launcher.num_processes=N": "workers on this machine",
    "parallel.cp_size=N": "processes that share one sequence",
    "parallel.ep_size=N": "processes that share the experts",
    "data.corpus=PATH": "text, JSONL or .bin/.idx: a file, a folder or a glob",
    "data.tokenizer=PATH": "a tokenizer.json, or bytes",
    "data.seq_len=N": "tokens per sequence",
    "train.steps=N": "optimizer steps",
    "train.global_batch_size=N": "sequences per step",
    "optim.lr=X": "peak learning rate",
    "checkpoint.every=N": "steps between checkpoints",
    "evaluation.every=N": "steps between evaluations of long contexts; msa-eval evaluates a checkpoint",
    "checkpoint.load=PATH": "another run to start from",
}

EXAMPLE = """\
example:
  msa-train run=demo parallel.cp_size=4 launcher.num_processes=4 train.steps=50"""


def help_text() -> str:
    """Write usage, runs, groups with their options, and the keys used most."""
    runs = _table(group_options("run"))
    groups = _table({group: ", ".join(group_options(group)) for group in OPTION_GROUPS if group != "run"})
    return "\n\n".join(
        [
            USAGE,
            f"runs:\n{runs}",
            f"groups and their options:\n{groups}",
            f"keys used most (all of them: msa-train run=demo --cfg):\n{_table(KEYS)}",
            OPTIONS,
            EXAMPLE,
        ]
    )


def _table(rows: dict[str, str]) -> str:
    """Write two columns, the first as wide as its longest name."""
    width = max(len(name) for name in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())
