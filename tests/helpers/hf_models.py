"""Random small models of transformers with their logits and gradients, left in folders for other processes.

Needs transformers, but importing this file does not.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VOCAB, FULL, SPARSE = 61, "full_attention", "minimax_m3_sparse"
MODEL, GRADIENTS, REFERENCE = "model", "gradients", "reference.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A model and the documents it reads.

    fields: of its config, over the defaults below. lengths: tokens of each document. gain: standard deviation
    of the weights; 1.0 drives gates and ups beyond the clamp at 7. kl_weight: of our training, which must not
    change any gradient but the index branch's.
    """

    name: str
    family: str
    lengths: tuple[int, ...]
    seq_len: int = 64
    gain: float = 0.3
    kl_weight: float = 0.0
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def block_size(self) -> int:
        """Tokens per block; documents begin at multiples of it."""
        return int(self.fields.get("index_block_size", 4))


def _mixed(kinds: str, dense: int, **fields: Any) -> dict[str, Any]:
    """ "fs" -> one full and one sparse layer, the first `dense` with a dense feed-forward network."""
    return {
        "num_hidden_layers": len(kinds),
        "layer_types": [SPARSE if kind == "s" else FULL for kind in kinds],
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (len(kinds) - dense),
        **fields,
    }


# within its ramp, as 4 or 8 channels have 2 or 4 frequencies
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 32}

SCENARIOS = [
    Scenario(name="m2", family="m2", lengths=(61,)),
    Scenario(
        name="m2_heads",
        family="m2",
        lengths=(30, 21),
        fields={"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6, "rotary_dim": 6},
    ),
    Scenario(name="m3_mixed", family="m3", lengths=(61,), fields=_mixed("fsfs", 1)),
    Scenario(
        name="m3_local_2",
        family="m3",
        lengths=(57,),
        fields=_mixed("ssf", 0, index_local_blocks=2, routed_scaling_factor=1.0),
    ),
    Scenario(
        name="m3_yarn",
        family="m3",
        lengths=(61,),
        fields=_mixed("sf", 0, rope=YARN, rotary_dim=6, index_head_dim=8, index_topk_blocks=3),
    ),
    Scenario(
        name="m2_linear",
        family="m2",
        lengths=(61,),
        fields={"rope": {"rope_type": "linear", "factor": 2.5}, "num_hidden_layers": 1},
    ),
    Scenario(
        name="m3_topk_above_blocks",
        family="m3",
        lengths=(43,),
        fields=_mixed("fss", 2, index_topk_blocks=40, routed_scaling_factor=2.5),
    ),
    Scenario(
        name="m3_many_heads_clamped",
        family="m3",
        lengths=(63,),
        gain=1.0,
        fields=_mixed(
            "sfs",
            1,
            num_attention_heads=8,
            num_key_value_heads=2,
            index_n_heads=2,
            head_dim=10,
            rotary_dim=6,
            index_head_dim=14,
            index_topk_blocks=2,
            rms_norm_eps=1e-3,
        ),
    ),
    Scenario(
        name="m3_dense_only",
        family="m3",
        lengths=(50,),
        fields=_mixed("ff", 2, index_topk_blocks=2),
    ),
    # packed here, one after another there
    Scenario(
        name="m3_documents", family="m3", lengths=(22, 3, 33), fields=_mixed("sfs", 1, index_topk_blocks=3)
    ),
    Scenario(
        name="m3_blocks_of_8",
        family="m3",
        lengths=(93, 30),
        seq_len=128,
        kl_weight=0.7,
        fields=_mixed("ss", 0, index_block_size=8, index_topk_blocks=4, index_local_blocks=2),
    ),
    Scenario(name="m3_tied", family="m3", lengths=(29,), fields=_mixed("fs", 1, tie_word_embeddings=True)),
    Scenario(name="m3_vision", family="m3_vl", lengths=(37,), fields=_mixed("fs", 1)),
]


def build_model(scenario: Scenario) -> Any:
    """The model of a scenario with random weights, norm weights and expert biases included."""
    from transformers import AutoModelForCausalLM, MiniMaxM2Config, MiniMaxM3VLConfig, MiniMaxM3VLTextConfig
    from transformers.models.minimax_m3_vl import MiniMaxM3SparseForConditionalGeneration

    values = _common(scenario)
    if scenario.family == "m2":
        model = AutoModelForCausalLM.from_config(MiniMaxM2Config(**values), attn_implementation="eager")
    elif scenario.family == "m3":
        model = AutoModelForCausalLM.from_config(MiniMaxM3VLTextConfig(**values), attn_implementation="eager")
    else:
        vision = {
            "hidden_size": 32,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
        }
        config = MiniMaxM3VLConfig(
            text_config=values, vision_config=vision | {"image_size": 28}, projector_hidden_size=16
        )
        config._attn_implementation = "eager"
        model = MiniMaxM3SparseForConditionalGeneration(config)
    _fill(model, scenario)
    return model.float().eval()


def _common(scenario: Scenario) -> dict[str, Any]:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "rotary_dim": 4,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if scenario.family != "m2":
        values |= {
            "dense_intermediate_size": 32,
            "shared_intermediate_size": 8,
            "index_n_heads": 3,
            "index_head_dim": 6,
            "index_block_size": 4,
            "index_topk_blocks": 5,
        }
    values |= scenario.fields
    factor = values["rotary_dim"] / values["head_dim"]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}
    rope |= values.pop("rope", {})
    return values | {"rope_parameters": rope}


@torch.no_grad()
def _fill(model: Any, scenario: Scenario) -> None:
    generator = torch.Generator().manual_seed(sum(map(ord, scenario.name)))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in name:
            continue
        around = 1.0 if scenario.family == "m2" and tensor.dim() == 1 and "norm" in name else 0.0
        tensor.normal_(around, scenario.gain if tensor.dim() > 1 else 0.3, generator=generator)


def documents(scenario: Scenario) -> list[Tensor]:
    """Token ids of each document."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in scenario.lengths]


def save_reference(scenario: Scenario, folder: Path) -> None:
    """Leave the model, its gradients (as a checkpoint of the same form), logits and loss in a folder."""
    model = build_model(scenario)
    model.save_pretrained(folder / MODEL, max_shard_size="30KB")
    texts = documents(scenario)
    logits = [model(input_ids=text[None]).logits[0] for text in texts]
    pairs = zip(logits, texts, strict=True)
    losses = [F.cross_entropy(one[:-1], text[1:], reduction="sum") for one, text in pairs]
    loss = torch.stack(losses).sum() / sum(len(text) - 1 for text in texts)
    loss.backward()
    torch.save({"logits": [one.detach() for one in logits], "loss": loss.item()}, folder / REFERENCE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(folder / GRADIENTS)
