"""Turn the arguments of msa-simulate into its scenario; mistakes are found before torch is imported."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from launchers.hydra_config.options import config_dir, group_options
from msa_train.config import AttentionConfig, ModelConfig

if TYPE_CHECKING:
    from msa_train.simulate.inputs.layer_shape import LayerShape
    from msa_train.simulate.inputs.placement import Placement
    from msa_train.simulate.inputs.scenario import Scenario
    from msa_train.simulate.selections.recorded import RecordedSelections, Selections

Config = TypeVar("Config", ModelConfig, AttentionConfig)


def read_question(arguments: argparse.Namespace) -> "tuple[Scenario, Callable[[Scenario], Selections]]":
    """Build the scenario, and the function that makes selections for it or for another size of it.

    Args:
        arguments: as the parser of msa-simulate run and scale gives them.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    given = [name for name in ("f", "alike_tokens", "selections") if getattr(arguments, name) is not None]
    if len(given) != 1:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given) or "none"
        raise ValueError(f"selections={names}: give exactly one of --f, --alike-tokens, --selections")
    # not at the top of the file: --help and the mistake above need none of it
    from msa_train.simulate.inputs.cluster import load_cluster
    from msa_train.simulate.inputs.rates import load_rates
    from msa_train.simulate.inputs.scenario import Options, Scenario, Scheme, equal_documents

    shape = read_shape(
        arguments.model,
        arguments.attention,
        element_bytes=4 if arguments.fp32 else 2,
        trains_index=not arguments.no_kl,
    )
    recorded = None if arguments.selections is None else _recorded(arguments)
    cu_seqlens = None if recorded is None else recorded.cu_seqlens
    if arguments.num_docs != 1:
        if recorded is not None:
            raise ValueError(
                f"--num-docs={arguments.num_docs}: a recording has its own documents; leave it out"
            )
        cu_seqlens = equal_documents(arguments.num_docs, arguments.seq_len, shape.block_size)
    scenario = Scenario(
        shape=shape,
        cluster=load_cluster(arguments.cluster),
        rates=load_rates(arguments.rates),
        seq_len=arguments.seq_len,
        cp_size=arguments.cp_size,
        layout=arguments.layout,
        cu_seqlens=cu_seqlens,
        schemes=[Scheme(name) for name in arguments.schemes],
        index_balance=not arguments.no_index_balance,
        options=Options(
            keep_for_backward=not arguments.refetch,
            overlap=not arguments.no_overlap,
            recompute=arguments.recompute,
            hot_share=arguments.hot_share,
            head_size=arguments.cp_head_size,
            query_slices=arguments.query_slices,
        ),
    )
    placement = scenario.placement()
    if recorded is not None:
        _check_fit(recorded, scenario, placement)
        return scenario, lambda _: recorded
    return scenario, _synthetic(arguments, scenario, placement)


def read_shape(model: str, attention: str, *, element_bytes: int, trains_index: bool) -> "LayerShape":
    """Read the sizes of a layer from a model and an attention of conf/.

    Args:
        model: name of an option of the group.
        attention: the same.
        element_bytes: bytes of a number on the wire.
        trains_index: the index branch gets gradients from the KL loss, which then travel too.

    Raises:
        ValueError: if there is no such option.
    """
    from msa_train.simulate.inputs.layer_shape import LayerShape

    return LayerShape.of(
        _read_config(ModelConfig, "model", model),
        _read_config(AttentionConfig, "attention", attention),
        element_bytes=element_bytes,
        trains_index=trains_index,
    )


def _read_config(kind: type[Config], group: str, name: str) -> Config:
    """Read one shipped file of a group by YAML alone: nothing is composed, so Hydra is not needed."""
    options = group_options(group)
    if name not in options:
        raise ValueError(f"--{group}={name}: must be one of {', '.join(options)}")
    path = config_dir() / group / f"{name}.yaml"
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    # YAML has names of choices where the dataclass has members of an Enum
    for field in fields(kind):
        if field.name in values and isinstance(field.type, type) and issubclass(field.type, Enum):
            values[field.name] = field.type(values[field.name])
    return kind(**values)


def _recorded(arguments: argparse.Namespace) -> "RecordedSelections":
    """Read the layer that --layer names from a recording, or the first."""
    from msa_train.simulate.selections.recorded import read_selections

    path: Path = arguments.selections
    layers = read_selections(path)
    if arguments.layer is None:
        return layers[0]
    for layer in layers:
        if layer.layer == arguments.layer:
            return layer
    known = ", ".join(str(layer.layer) for layer in layers)
    raise ValueError(f"--layer={arguments.layer}: {path} has layers {known}; name one of them")


def _check_fit(recorded: "RecordedSelections", scenario: "Scenario", placement: "Placement") -> None:
    """Refuse a recording of another model or length than the scenario's."""
    for name, expected in (("num_kv_heads", scenario.shape.num_kv_heads), ("topk", scenario.shape.topk)):
        value = getattr(recorded, name)
        if value != expected:
            raise ValueError(
                f"{name}={value} in the recording: must be the model's {expected}; use its --model"
            )
    # raises where the lengths do not fit
    recorded.needed(placement, 0)


def _synthetic(
    arguments: argparse.Namespace, scenario: "Scenario", placement: "Placement"
) -> "Callable[[Scenario], Selections]":
    """Return what makes selections for a scenario; that of the command line is checked here."""
    from msa_train.simulate.selections.synthetic import SyntheticSelections

    def make(asked: "Scenario") -> SyntheticSelections:
        return SyntheticSelections(
            num_kv_heads=asked.shape.num_kv_heads,
            topk=asked.shape.topk,
            local_blocks=asked.shape.local_blocks,
            f=arguments.f,
            alike_tokens=arguments.alike_tokens,
            sink_blocks=arguments.sink_blocks,
            popular_share=arguments.popular_share,
            popular_exponent=arguments.popular_exponent,
            distance_exponent=arguments.distance_exponent,
            seed=arguments.seed,
        )

    # now, not in the middle of a table of sizes
    make(scenario).check(placement)
    return make
