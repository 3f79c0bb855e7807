"""The table between Hugging Face's tensors and ours."""

from collections import Counter

import pytest

from launchers.hydra_config.compose import compose_run
from msa_train.config.model_size import model_size
from msa_train.convert.tensor_map import (
    M2_NAMING,
    M3_NAMING,
    M3_TEXT_NAMING,
    Naming,
    Span,
    TensorTable,
    build_table,
    detect_naming,
)
from tests.helpers.hf_files import small_m2, small_m3

CASES = {
    "m2": (small_m2(), M2_NAMING),
    "m3": (small_m3(), M3_NAMING),
    "m3_text": (small_m3(), M3_TEXT_NAMING),
    "m2_fused": (small_m2(), Naming(bias="e_score_correction_bias")),
}


def num_rows(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[1] if len(shape) == 3 else shape[0]


@pytest.mark.parametrize("name", CASES)
def test_every_row_of_both_sides_has_one_partner(name: str) -> None:
    shape, naming = CASES[name]
    table = build_table(*shape, naming)
    for groups, shapes, first in (
        (table.by_name(), table.hf_shapes, lambda span: span.name_row),
        (table.by_key(), table.shapes, lambda span: span.key_row),
    ):
        assert groups.keys() == shapes.keys()
        for tensor, spans in groups.items():
            rows = [first(span) + i for span in spans for i in range(span.num_rows)]
            assert rows == list(range(num_rows(shapes[tensor]))), tensor


@pytest.mark.parametrize("name", CASES)
def test_both_sides_have_the_same_columns(name: str) -> None:
    shape, naming = CASES[name]
    table = build_table(*shape, naming)
    for span in table.spans:
        theirs, ours = table.hf_shapes[span.name], table.shapes[span.key]
        assert (theirs[-1:] if len(theirs) > 1 else ()) == (ours[-1:] if len(ours) > 1 else ()), span


@pytest.mark.parametrize("name", CASES)
def test_naming_is_found_again(name: str) -> None:
    shape, naming = CASES[name]
    names = build_table(*shape, naming).hf_shapes
    found = detect_naming(
        [*names, "vision_tower.embed_tokens.weight", "multi_modal_projector.gate_up_proj.weight"]
    )
    assert build_table(*shape, found).hf_shapes == names


def test_other_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: is not there"):
        detect_naming(["transformer.wte.weight"])


def test_example_of_the_docstring() -> None:
    model, attention = small_m2()
    model.num_heads, model.num_kv_heads = 4, 2
    spans = build_table(model, attention, M2_NAMING).by_key()[
        "decoder.layers.0.self_attention.linear_qkv.weight"
    ]
    attn = "model.layers.0.self_attn."
    key = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert spans[:4] == [
        Span(f"{attn}q_proj.weight", 0, key, 0, 16),
        Span(f"{attn}k_proj.weight", 0, key, 16, 8),
        Span(f"{attn}v_proj.weight", 0, key, 24, 8),
        Span(f"{attn}q_proj.weight", 16, key, 32, 16),
    ]


def test_experts_gate_up_down() -> None:
    spans = build_table(*small_m3(), M3_NAMING).by_key()[
        "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
    ]
    moe = "language_model.model.layers.1.block_sparse_moe.experts."
    assert [(span.name.removeprefix(moe), span.key_row) for span in spans[:4]] == [
        ("0.w1.weight", 0),
        ("0.w3.weight", 16),
        ("1.w1.weight", 32),
        ("1.w3.weight", 48),
    ]


def test_released_sizes() -> None:
    """Numbers of tensors: 8 per layer for attention and norms, 4 for an index branch, 3 for a dense or shared
    network, 2 for a router, 3 per expert, and embedding, last norm and head."""
    m2 = 62 * (8 + 2 + 3 * 256) + 3
    m3 = 60 * 8 + 57 * 4 + 3 * 3 + 57 * (2 + 3 * 128 + 3) + 3
    for run, naming, num_tensors in (("m2_32k", M2_NAMING, m2), ("m3_200k", M3_NAMING, m3)):
        config = compose_run([f"run={run}"])
        table = build_table(config.model, config.attention, naming)
        assert len(table.hf_shapes) == num_tensors
        assert total(table) == model_size(config.model, config.attention).total


def total(table: TensorTable) -> int:
    sizes: Counter[str] = Counter()
    for name, shape in table.hf_shapes.items():
        count = 1
        for size in shape:
            count *= size
        sizes[name] = count
    return sizes.total()
