"""Files of both kinds: safetensors, and Megatron's checkpoints written and read without process groups."""

import itertools
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msa_train.checkpoint.torch_dist.files import ShardedReader, ShardedWriter
from msa_train.convert.config_read import read_hf_config
from msa_train.convert.contents import ContentCheck, dtype_warning
from msa_train.convert.export_hf import plan_export, read_config_file, write_export
from msa_train.convert.import_hf import BOX_BYTES, Box, boxes, check_unplaced, plan_import, write_import
from msa_train.convert.safetensors_files import (
    INDEX_NAME,
    SINGLE_NAME,
    NewTensor,
    RowReader,
    dtype_name,
    pack_files,
    read_index,
    write_file,
)
from msa_train.convert.safetensors_header import read_header
from msa_train.convert.tensor_map import M2_NAMING, M3_NAMING, M3_TEXT_NAMING, Naming
from tests.helpers.hf_files import read_tensors, small_m2, small_m3, write_checkpoint

CASES = {
    "m2": (small_m2(), M2_NAMING),
    "m3_text": (small_m3(), M3_TEXT_NAMING),
    "m3": (small_m3(), M3_NAMING),
    "m2_fused": (small_m2(), Naming(bias="e_score_correction_bias")),
}


def ignore(_num_bytes: int) -> None:
    """No progress."""


def convert(source: Path, target: Path) -> Path:
    hf = read_hf_config(read_config_file(source))
    target.mkdir()
    write_import(plan_import(source, hf), target, ignore)
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_import_then_export_is_bit_equal(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    shape, naming = CASES[name]
    want = write_checkpoint(tmp_path / "hf", shape, naming, dtype=dtype)
    ours = convert(tmp_path / "hf", tmp_path / "ours")
    like = None if naming in (M2_NAMING, M3_TEXT_NAMING) else tmp_path / "hf"
    plan = plan_export(ours, *shape, like=like, shard_bytes=30_000)
    assert len(plan.files) > 1
    write_export(plan, tmp_path / "back", ignore)
    got = read_tensors(tmp_path / "back")
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype
        assert torch.equal(got[key].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), key
    if like is None:
        assert str(dtype) == "torch." + read_config_file(tmp_path / "back")["dtype"]
    else:
        assert read_config_file(tmp_path / "back") == read_config_file(like)
        assert sorted(p.name for p in (tmp_path / "back").iterdir()) == sorted(p.name for p in like.iterdir())


def test_tensors_without_a_place(tmp_path: Path) -> None:
    extra = {
        "vision_tower.patch.weight": torch.randn(3, 5),
        "language_model.model.mtp.layers.0.eh_proj.weight": torch.randn(4),
    }
    want = write_checkpoint(tmp_path / "hf", small_m3(), M3_NAMING, extra=extra)
    plan = plan_import(tmp_path / "hf", read_hf_config(read_config_file(tmp_path / "hf")))
    assert set(plan.unplaced) == set(extra)
    with pytest.raises(ValueError, match=r"2 tensors have no place in the model: .*--skip-unplaced"):
        check_unplaced(plan.unplaced, skip=False)
    check_unplaced(plan.unplaced, skip=True)
    check_unplaced([], skip=False)
    ours = convert(tmp_path / "hf", tmp_path / "ours")
    back = plan_export(ours, *small_m3(), like=tmp_path / "hf")
    assert set(back.copied) == set(extra)
    write_export(back, tmp_path / "back", ignore)
    got = read_tensors(tmp_path / "back")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_dtype_of_an_export(tmp_path: Path) -> None:
    want = write_checkpoint(tmp_path / "hf", small_m2(), M2_NAMING, dtype=torch.bfloat16)
    ours = convert(tmp_path / "hf", tmp_path / "ours")
    write_export(plan_export(ours, *small_m2(), dtype=torch.float32), tmp_path / "fp32", ignore)
    for name, tensor in read_tensors(tmp_path / "fp32").items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, want[name].float())
    assert read_config_file(tmp_path / "fp32")["dtype"] == "float32"


def test_fp32_export_takes_the_master_weights(tmp_path: Path) -> None:
    shape = small_m2()
    write_checkpoint(tmp_path / "hf", shape, M2_NAMING, dtype=torch.bfloat16)
    plan = plan_import(tmp_path / "hf", read_hf_config(read_config_file(tmp_path / "hf")))
    (tmp_path / "ours").mkdir()
    writer, masters = ShardedWriter(tmp_path / "ours"), {}
    for key, size in plan.table.shapes.items():
        masters[key] = torch.randn(size)
        writer.add(key, size, [0] * len(size), masters[key].bfloat16())
        if not key.endswith("expert_bias"):
            writer.add(f"optimizer.state.fp32_param.{key}", size, [0] * len(size), masters[key])
    writer.close()
    write_export(plan_export(tmp_path / "ours", *shape, dtype=torch.float32), tmp_path / "back", ignore)
    got = read_tensors(tmp_path / "back")
    assert torch.equal(got["lm_head.weight"], masters["output_layer.weight"])
    bias = got["model.layers.0.block_sparse_moe.e_score_correction_bias"]
    assert torch.equal(bias, masters["decoder.layers.0.mlp.router.expert_bias"].bfloat16())


@pytest.mark.parametrize("box_bytes", [1, 500, 4000, BOX_BYTES])
def test_boxes_cover_every_number_once(box_bytes: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", small_m3(), M3_TEXT_NAMING)
    plan = plan_import(tmp_path / "hf", read_hf_config(read_config_file(tmp_path / "hf")))
    counts = {key: torch.zeros(shape, dtype=torch.int64) for key, shape in plan.table.shapes.items()}
    for box in boxes(plan, box_bytes):
        counts[box.key][tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))] += 1
        assert rows_of(box) == 1 or 4 * torch.Size(box.sizes).numel() <= box_bytes
        assert sum(span.num_rows for span in box.spans) == rows_of(box)
    for key, count in counts.items():
        assert bool((count == 1).all()), key


def rows_of(box: Box) -> int:
    return box.sizes[0] if len(box.sizes) < 3 else box.sizes[1]


def test_reader_puts_any_boxes_together(tmp_path: Path) -> None:
    """Boxes as tensor-, pipeline- and expert-parallel ranks leave them, cut along rows and columns."""
    writer = ShardedWriter(tmp_path, max_file_bytes=2000)
    whole = {
        "experts": torch.randn(4, 6, 10),
        "matrix": torch.randn(8, 10),
        "vector": torch.randn(9),
    }
    cuts = {"experts": ((1, 3), (3,), (4, 10)), "matrix": ((3, 5), (5,)), "vector": ((2, 4, 3),)}
    for key, tensor in whole.items():
        steps = [edges(size, cut) for size, cut in zip(tensor.shape, cuts[key], strict=True)]
        for place in itertools.product(*steps):
            part = tensor[tuple(slice(a, b) for a, b in place)]
            writer.add(key, tensor.shape, [a for a, _ in place], part)
    writer.add_empty_object("module._extra_state", 3)
    writer.close()
    assert len(writer.files) > 5
    reader = ShardedReader(tmp_path)
    assert reader.shapes() == {key: tuple(tensor.shape) for key, tensor in whole.items()}
    for key, tensor in whole.items():
        flat = tensor.view(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor
        rows = tensor.shape[-2] if tensor.dim() == 3 else len(flat)
        for first in range(len(flat)):
            for count in range(1, rows - first % rows + 1):
                assert torch.equal(reader.rows(key, first, count), flat[first : first + count]), (key, first)


def test_tensors_that_are_not_row_by_row_are_refused(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path)
    writer.add("matrix", (4, 3), (0, 0), torch.randn(3, 4).T)
    writer.close()
    with pytest.raises(ValueError, match=r"__0_0\.distcp: a tensor is not stored row by row"):
        ShardedReader(tmp_path).rows("matrix", 0, 1)


def edges(size: int, widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Intervals of the widths, the last width repeated: (7, (2, 3)) -> (0, 2), (2, 5), (5, 7)."""
    result, at = [], 0
    widths_left = iter(widths)
    width = 0
    while at < size:
        width = next(widths_left, width)
        result.append((at, min(at + width, size)))
        at += width
    return result


def test_safetensors_reads_our_files(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.torch")
    tensors = {"a.b": torch.randn(3, 4), "c": torch.randn(5).bfloat16(), "d": torch.arange(6)}

    def rows(tensor: Tensor) -> Iterator[Tensor]:
        yield from tensor.split(2)

    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    new = [
        NewTensor(name, names[one.dtype], tuple(one.shape), one.nbytes, lambda one=one: rows(one))
        for name, one in tensors.items()
    ]
    write_file(tmp_path / "ours.safetensors", new, ignore)
    got = package.load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())
    package.save_file(tensors, tmp_path / "theirs.safetensors")
    reader, header = RowReader(), read_header(tmp_path / "theirs.safetensors")
    out = torch.empty(2, 4)
    reader.read_into(header["a.b"], 1, out)
    reader.close()
    assert torch.equal(out, tensors["a.b"][1:])


def test_large_tensors_have_files_of_their_own() -> None:
    sizes = [3, 4, 20, 5, 5, 1]
    tensors = [NewTensor(str(n), "F32", (n,), n, lambda: iter([])) for n in sizes]
    assert [[t.num_bytes for t in part] for part in pack_files(tensors, 10)] == [[3, 4], [20], [5, 5], [1]]


def broken(folder: Path) -> Iterator[tuple[str, str]]:
    """Breaks a good checkpoint in one way after another; yields what the refusal says."""
    index = folder / INDEX_NAME
    text = index.read_text()
    first = folder / "model-00001-of-00003.safetensors"
    content = first.read_bytes()

    first.write_bytes(content[:-1])
    yield "bytes", "model-00001-of-00003.safetensors: has "
    first.write_bytes(struct.pack("<Q", 2**60) + content[8:])
    yield "length", "model-00001-of-00003.safetensors: is not a safetensors file"
    first.write_bytes(b"")
    yield "empty", "model-00001-of-00003.safetensors: is not a safetensors file"
    first.unlink()
    yield "missing", "model-00001-of-00003.safetensors: does not exist"
    first.write_bytes(content)

    index.write_text(text[:-20])
    yield "index", f"{INDEX_NAME}: is not JSON"
    changed = json.loads(text)
    changed["weight_map"]["another"] = first.name
    index.write_text(json.dumps(changed))
    yield "entry", "tensor another: "
    index.unlink()
    yield "no index", f"{SINGLE_NAME}: does not exist"
    index.write_text(text)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", small_m2(), M2_NAMING, shard_bytes=30_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 3
    for what, line in broken(tmp_path / "hf"):
        with pytest.raises(ValueError) as caught:
            read_index(tmp_path / "hf")
        assert line in str(caught.value), what
        assert "\n" not in str(caught.value)
    read_index(tmp_path / "hf")


def write_fp8(folder: Path, *, block: tuple[int, int], leave_out: str = "") -> dict[str, Tensor]:
    """A checkpoint with 8-bit weights of the experts and of attention; returns what they stand for."""
    tensors = write_checkpoint(folder, small_m2(), M2_NAMING, dtype=torch.bfloat16, shard_bytes=10**6)
    stored: dict[str, Tensor] = {}
    for name, tensor in list(tensors.items()):
        if tensor.dim() < 2 or not (".experts." in name or "_proj" in name):
            stored[name] = tensor
            continue
        stored[name] = tensor.float().to(torch.float8_e4m3fn)
        scale = torch.rand(*(-(-size // b) for size, b in zip(tensor.shape, block, strict=True)))
        stored[name + "_scale_inv"] = scale
        tensors[name] = torch.empty_like(tensor)
        for row, column in itertools.product(*map(range, tensor.shape)):
            factor = scale[row // block[0], column // block[1]]
            tensors[name][row, column] = stored[name][row, column].float() * factor
    stored.pop(leave_out, None)
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
    new = [
        NewTensor(key, names[t.dtype], tuple(t.shape), t.nbytes, lambda t=t: iter([t]))
        for key, t in stored.items()
    ]
    write_file(folder / SINGLE_NAME, new, ignore)
    config = read_config_file(folder)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(block)}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("block", [(128, 128), (5, 7), (8, 8)])
def test_block_scaled_weights_become_bf16(block: tuple[int, int], tmp_path: Path) -> None:
    want = write_fp8(tmp_path / "hf", block=block)
    hf = read_hf_config(read_config_file(tmp_path / "hf"))
    assert hf.fp8_block == block
    assert plan_import(tmp_path / "hf", hf).unplaced == []
    ours = convert(tmp_path / "hf", tmp_path / "ours")
    write_export(plan_export(ours, *small_m2()), tmp_path / "back", ignore)
    got = read_tensors(tmp_path / "back")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype is tensor.dtype
        assert torch.equal(got[name], tensor), name
    with pytest.raises(ValueError, match="has 8-bit weights"):
        plan_export(ours, *small_m2(), like=tmp_path / "hf")


def test_missing_scale_is_refused(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    write_fp8(tmp_path / "hf", block=(8, 8), leave_out=name + "_scale_inv")
    with pytest.raises(ValueError, match=rf"tensor {name}: has no scale, should have .* F32 \[3, 3\]"):
        plan_import(tmp_path / "hf", read_hf_config(read_config_file(tmp_path / "hf")))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight"),
        (
            {"vocab_size": 60},
            "tensor model.embed_tokens.weight: has shape [61, 24] where config.json gives [60, 24]",
        ),
    ],
)
def test_files_of_another_model_are_refused(change: dict[str, int], line: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", small_m2(), M2_NAMING)
    hf = read_hf_config(read_config_file(tmp_path / "hf") | change)
    with pytest.raises(ValueError) as caught:
        plan_import(tmp_path / "hf", hf)
    assert line in str(caught.value)


def test_parts_of_different_types_are_refused(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "hf", small_m2(), M2_NAMING, shard_bytes=10**6)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    new = [
        NewTensor(key, "BF16" if key == name else "F32", tuple(t.shape), t.nbytes, lambda t=t: iter([t]))
        for key, t in tensors.items()
    ]
    write_file(tmp_path / "hf" / SINGLE_NAME, new, ignore)
    with pytest.raises(
        ValueError, match=r"k_proj\.weight: has dtype BF16, .*q_proj\.weight has F32, and both"
    ):
        plan_import(tmp_path / "hf", read_hf_config(read_config_file(tmp_path / "hf")))


def test_export_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", small_m2(), M2_NAMING)
    ours = convert(tmp_path / "hf", tmp_path / "ours")
    model, attention = small_m2()
    model.vocab_size = 64
    with pytest.raises(ValueError, match=r"shape \[61, 24\] for embedding\.word_embeddings\.weight"):
        plan_export(ours, model, attention)
    write_checkpoint(tmp_path / "other", small_m3(), M3_NAMING)
    with pytest.raises(ValueError, match=r"is of another model"):
        plan_export(ours, *small_m2(), like=tmp_path / "other")


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", small_m2(), M2_NAMING)
    ours = convert(tmp_path / "hf", tmp_path / "ours")

    def fail(_num_bytes: int) -> None:
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_export(plan_export(ours, *small_m2()), tmp_path / "back", fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours"]


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    new = [
        NewTensor(key, dtype_name(t.dtype), tuple(t.shape), t.nbytes, lambda t=t: iter([t]))
        for key, t in tensors.items()
    ]
    write_file(folder / SINGLE_NAME, new, ignore)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.self_attn.k_norm.weight"])
def test_numbers_that_are_not_finite_are_refused(name: str, value: float, tmp_path: Path) -> None:
    tensors = write_checkpoint(
        tmp_path / "hf", small_m2(), M2_NAMING, dtype=torch.bfloat16, shard_bytes=10**9
    )
    tensors[name][7] = value
    rewrite(tmp_path / "hf", tensors)
    with pytest.raises(ValueError, match=rf"^tensor {name}: row 7 holds numbers that are not finite; "):
        convert(tmp_path / "hf", tmp_path / "ours")


def test_half_a_file_of_zeros_is_refused(tmp_path: Path) -> None:
    """A download that reserved its space and broke off."""
    write_checkpoint(tmp_path / "hf", small_m3(), M3_TEXT_NAMING, shard_bytes=10**9)
    path = tmp_path / "hf" / SINGLE_NAME
    content = path.read_bytes()
    for share in (0.2, 0.5, 0.8):
        kept = int(share * len(content))
        path.write_bytes(content[:kept] + bytes(len(content) - kept))
        with pytest.raises(ValueError, match=r"^tensor \S+: is zeros all over, .*or --allow-zeros"):
            convert(tmp_path / "hf", tmp_path / f"ours{share}")


def test_rows_of_zeros_are_told(tmp_path: Path) -> None:
    """Tokens that do not exist may have such rows; vectors and a matrix that is meant so may be zeros."""
    tensors = write_checkpoint(tmp_path / "hf", small_m2(), M2_NAMING, shard_bytes=10**9)
    tensors["lm_head.weight"][50:] = 0
    tensors["model.norm.weight"][:] = 0
    matrix = "model.layers.0.self_attn.o_proj.weight"
    tensors[matrix][:] = 0
    rewrite(tmp_path / "hf", tensors)
    plan = plan_import(tmp_path / "hf", read_hf_config(read_config_file(tmp_path / "hf")))
    (tmp_path / "ours").mkdir()
    with pytest.raises(ValueError, match=rf"^tensor {matrix}: is zeros all over"):
        write_import(plan, tmp_path / "ours", ignore, check=ContentCheck(plan.table.hf_shapes))
    check = ContentCheck(plan.table.hf_shapes, allow_zeros=True)
    write_import(plan, tmp_path / "ours", ignore, check=check, box_bytes=500)
    assert sorted(check.warnings()) == [
        "tensor lm_head.weight: 11 of 61 rows are zeros",
        f"tensor {matrix}: 24 of 24 rows are zeros",
    ]


def test_dtype_of_another_model_is_told() -> None:
    stored = {torch.bfloat16}
    assert dtype_warning({"dtype": "bfloat16"}, stored) is None
    assert dtype_warning({"torch_dtype": "auto", "text_config": {"dtype": "bfloat16"}}, stored) is None
    assert dtype_warning({"dtype": ["x"]}, stored) is None
    line = dtype_warning({"text_config": {"torch_dtype": "float32"}}, stored)
    assert line is not None
    assert line.startswith("config.json says torch_dtype=float32, the weights are bfloat16; ")
