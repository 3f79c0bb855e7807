"""Hugging Face checkpoints with random weights, written without transformers."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from msa_train.config import Activation, AttentionConfig, ModelConfig, QkNorm
from msa_train.convert.config_write import write_hf_config
from msa_train.convert.safetensors_files import (
    DTYPES,
    INDEX_NAME,
    NewTensor,
    RowReader,
    dtype_name,
    file_names,
    index_json,
    pack_files,
    read_index,
    write_file,
)
from msa_train.convert.tensor_map import Naming, build_table


def small_m2() -> tuple[ModelConfig, AttentionConfig]:
    """Two layers of the M2 kind."""
    model = ModelConfig(
        name="imported",
        num_layers=2,
        hidden_size=24,
        num_heads=6,
        num_kv_heads=3,
        head_dim=8,
        vocab_size=61,
        ffn_hidden_size=16,
        num_dense_ffn_layers=0,
        num_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=16,
        shared_expert_hidden_size=0,
        layer_attention="full",
        rotary_dim=4,
        qk_norm=QkNorm.width,
        zero_centered_norm=False,
        activation=Activation.swiglu,
    )
    return model, AttentionConfig()


def small_m3() -> tuple[ModelConfig, AttentionConfig]:
    """Four layers of the M3 kind, full attention and MSA in turn, the first with a dense network."""
    model = ModelConfig(
        name="imported",
        num_layers=4,
        hidden_size=24,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        vocab_size=64,
        ffn_hidden_size=32,
        num_dense_ffn_layers=1,
        num_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=16,
        shared_expert_hidden_size=8,
        routed_scaling_factor=2.0,
        layer_attention="full,msa,full,msa",
        rotary_dim=4,
        rope_theta=10000.0,
    )
    return model, AttentionConfig(block_size=4, topk=3, index_head_dim=6)


def write_checkpoint(
    folder: Path,
    shape: tuple[ModelConfig, AttentionConfig],
    naming: Naming,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 20_000,
    extra: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Write a checkpoint folder; expert biases are fp32. Returns its tensors."""
    generator = torch.Generator().manual_seed(5)
    tensors = dict(extra or {})
    for name, size in build_table(*shape, naming).hf_shapes.items():
        kind = torch.float32 if name.endswith("e_score_correction_bias") else dtype
        tensors[name] = torch.randn(size, generator=generator).to(kind)
    new = [
        NewTensor(name, dtype_name(one.dtype), tuple(one.shape), one.nbytes, lambda one=one: iter([one]))
        for name, one in tensors.items()
    ]
    folder.mkdir(parents=True)
    packed = pack_files(new, shard_bytes)
    files = dict(zip(file_names(len(packed)), packed, strict=True))
    for name, part in files.items():
        write_file(folder / name, part, lambda _: None)
    if len(files) > 1:
        (folder / INDEX_NAME).write_text(json.dumps(index_json(files)))
    config = write_hf_config(*shape, dtype=str(dtype).removeprefix("torch."))
    if naming.prefix != "model.":
        config = {"model_type": "minimax_m3_vl", "text_config": config, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder."""
    return dict(_read(folder))


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    reader = RowReader()
    for name, entry in read_index(folder).items():
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        reader.read_into(entry, 0, tensor.view(-1, *entry.shape[-1:]) if tensor.dim() > 1 else tensor)
        yield name, tensor
    reader.close()
