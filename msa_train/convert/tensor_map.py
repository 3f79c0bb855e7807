"""Map each row of a Hugging Face checkpoint to its place in ours: one table for import and export.

Hugging Face keeps q, k and v apart and, in the released checkpoints, every expert. Ours has Megatron's
layout: q, k and v fused per KV head, gate above up, all experts of a layer in one tensor [num_experts, rows,
columns]. Both sides differ only in the order of rows, so that a `Span` of consecutive rows describes
everything. Rows are counted with the leading dimensions flattened: expert e of [E, R, C] begins at row e * R.

Names of a layer, theirs (M3) -> ours below decoder.layers.N.:

    self_attn.{q,k,v}_proj                          self_attention.linear_qkv
    self_attn.o_proj                                self_attention.linear_proj
    self_attn.{q,k}_norm                            self_attention.{q,k}_layernorm
    self_attn.index_{q,k}_proj, index_{q,k}_norm    self_attention.index_branch.linear_{q,k}, {q,k}_norm
    post_attention_layernorm                        pre_mlp_layernorm
    mlp.{gate,up}_proj, down_proj                   mlp.linear_fc1, linear_fc2
    block_sparse_moe.gate, e_score_correction_bias  mlp.router.weight, expert_bias
    block_sparse_moe.experts.E.{w1,w3}, w2          mlp.experts.experts.linear_fc1[E], linear_fc2[E]
    block_sparse_moe.shared_experts.*               mlp.shared_experts.*, as of mlp

Cost: a span per whole tensor, 3 M per attention, 2 to 3 per expert: 23,433 for M3 as it is released.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from msa_train.config import AttentionConfig, AttentionKind, ModelConfig, QkNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """Spell the tensors of a Hugging Face checkpoint.

    Three spellings occur: the released ones of M2 and M3 (the second inside a vision-language model), which
    transformers also writes for these; and that of a bare text model of M3, which transformers writes as it
    holds it in memory.
    """

    prefix: str = "model."
    "before everything but the head"
    head: str = "lm_head.weight"
    "name of the output layer"
    moe: str = "mlp"
    "folder of router and experts in a layer"
    bias: str = "gate.e_score_correction_bias"
    "the expert bias below `moe`"
    fused_experts: bool = True
    "gate_up_proj and down_proj hold all experts; otherwise w1 (gate), w3 (up) and w2 (down) of each"
    fused_gate_up: bool = True
    "gate_up_proj of dense and shared feed-forward layers; otherwise gate_proj and up_proj"
    index: str = "indexer."
    "before q_proj, k_proj, q_norm and k_norm of the index branch"


M2_NAMING = Naming(
    moe="block_sparse_moe", bias="e_score_correction_bias", fused_experts=False, fused_gate_up=False
)
M3_TEXT_NAMING = Naming()
M3_NAMING = Naming(
    prefix="language_model.model.",
    head="language_model.lm_head.weight",
    moe="block_sparse_moe",
    bias="e_score_correction_bias",
    fused_experts=False,
    fused_gate_up=False,
    index="index_",
)
_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")


def detect_naming(names: Collection[str]) -> Naming:
    """Detect the spelling of a checkpoint from the names of its tensors.

    Raises:
        ValueError: where no token embedding is found.
    """
    prefix = next((p for p in _PREFIXES if f"{p}embed_tokens.weight" in names), None)
    if prefix is None:
        raise ValueError(
            f"tensor model.embed_tokens.weight: is not there, nor below {' or '.join(_PREFIXES[1:])}; this "
            "is no checkpoint of a minimax_m2 or minimax_m3_vl language model"
        )
    # names of the vision tower, which has layers of its own, say nothing
    own = [name for name in names if name.startswith(prefix)]
    return Naming(
        prefix=prefix,
        head=next((head for head in _HEADS if head in names), _HEADS[0]),
        moe="block_sparse_moe" if any(".block_sparse_moe." in name for name in own) else "mlp",
        bias="gate.e_score_correction_bias"
        if any(name.endswith(".gate.e_score_correction_bias") for name in own)
        else "e_score_correction_bias",
        fused_experts=any(name.endswith(".experts.gate_up_proj") for name in own),
        fused_gate_up=any(name.endswith(".gate_up_proj.weight") for name in own),
        index="index_" if any(".self_attn.index_" in name for name in own) else "indexer.",
    )


@dataclass(frozen=True, slots=True)
class Span:
    """Equate `num_rows` rows of `name` from `name_row` on with those of our `key` from `key_row` on."""

    name: str
    "Hugging Face's name of the tensor"
    name_row: int
    "first row there"
    key: str
    "our name of the tensor"
    key_row: int
    "first row here"
    num_rows: int
    "consecutive rows on both sides"


@dataclass(slots=True)
class TensorTable:
    """Hold all tensors of a model under both names."""

    spans: list[Span] = field(default_factory=list)
    "those of one key, and those of one name, are ascending and leave nothing out"
    hf_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    "shape by Hugging Face name"
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    "shape by our key"
    objects: dict[str, int] = field(default_factory=dict)
    "modules of ours with an (empty) extra state of Megatron, with the number of experts or 0"

    def add(self, name: str, key: str, shape: tuple[int, ...]) -> None:
        """Add a tensor that is the same on both sides; one span per expert where it holds several.

        Example: [2, 4, 3] -> spans of rows 0-3 and 4-7.
        """
        self.hf_shapes[name] = self.shapes[key] = shape
        # [E, R, C] has R rows in each of E experts; vectors have rows of one number
        count, rows = (shape[0], shape[1]) if len(shape) == 3 else (1, shape[0])
        self.spans += [Span(name, i * rows, key, i * rows, rows) for i in range(count)]

    def by_name(self) -> dict[str, list[Span]]:
        """Return the spans of each Hugging Face tensor, by row: the order of an export."""
        return self._group(lambda span: (span.name, span.name_row))

    def by_key(self) -> dict[str, list[Span]]:
        """Return the spans of each of our tensors, by row: the order of an import."""
        return self._group(lambda span: (span.key, span.key_row))

    def _group(self, place: Callable[[Span], tuple[str, int]]) -> dict[str, list[Span]]:
        groups: dict[str, list[Span]] = {}
        for span in self.spans:
            groups.setdefault(place(span)[0], []).append(span)
        return {name: sorted(spans, key=lambda span: place(span)[1]) for name, spans in groups.items()}


def build_table(model: ModelConfig, attention: AttentionConfig, naming: Naming) -> TensorTable:
    """Build the table of every tensor of the model.

    Args:
        model, attention: the shape.
        naming: spelling on the Hugging Face side.

    Example: with 4 query heads, 2 KV heads and head_dim 8, rows 0-15 of linear_qkv are rows 0-15 of q_proj
    (heads 0 and 1), rows 16-23 are rows 0-7 of k_proj, rows 24-31 rows 0-7 of v_proj, rows 32-47 rows 16-31
    of q_proj, and so on. With 2 experts of width 3, rows 0-2 of linear_fc1 are w1 of expert 0, rows 3-5 its
    w3, rows 6-8 w1 of expert 1, rows 9-11 its w3.
    """
    table, hidden = TensorTable(), model.hidden_size
    table.add(
        f"{naming.prefix}embed_tokens.weight", "embedding.word_embeddings.weight", (model.vocab_size, hidden)
    )
    # in the order of the layers, so that an import's boxes come out in the order of the model
    for index, kind in enumerate(model.attention_kinds()):
        layer = _Layer(table, model, naming, f"{naming.prefix}layers.{index}.", f"decoder.layers.{index}.")
        layer.attention()
        if kind is AttentionKind.msa:
            layer.index_branch(attention.index_head_dim)
        if index < model.num_dense_ffn_layers:
            layer.gated("mlp.", "mlp.", model.ffn_hidden_size)
        else:
            layer.experts()
    table.add(f"{naming.prefix}norm.weight", "decoder.final_layernorm.weight", (hidden,))
    if not model.tie_embeddings:
        table.add(naming.head, "output_layer.weight", (model.vocab_size, hidden))
    return table


@dataclass(slots=True)
class _Layer:
    """Add the tensors of one layer."""

    table: TensorTable
    "that gets them"
    model: ModelConfig
    "shape"
    naming: Naming
    "Hugging Face's spelling"
    name: str
    "their prefix of the layer"
    key: str
    "our prefix of the layer"

    def attention(self) -> None:
        """Add the attention's projections and norms, and the layer's two norms."""
        model, attn, ours = self.model, f"{self.name}self_attn.", f"{self.key}self_attention."
        hidden, dim = model.hidden_size, model.head_dim
        self.table.add(f"{self.name}input_layernorm.weight", f"{self.key}input_layernorm.weight", (hidden,))
        self._qkv(attn, f"{ours}linear_qkv")
        self.table.add(f"{attn}o_proj.weight", f"{ours}linear_proj.weight", (hidden, model.num_heads * dim))
        self.table.objects[f"{ours}linear_proj"] = 0
        for ours_norm, theirs, heads in (("q", "q", model.num_heads), ("k", "k", model.num_kv_heads)):
            # a norm per head has one weight of D shared by all heads, a norm over the width Hq D or M D
            width = dim if model.qk_norm is QkNorm.head else heads * dim
            if model.qk_norm is not QkNorm.none:
                self.table.add(f"{attn}{theirs}_norm.weight", f"{ours}{ours_norm}_layernorm.weight", (width,))
        self.table.add(
            f"{self.name}post_attention_layernorm.weight", f"{self.key}pre_mlp_layernorm.weight", (hidden,)
        )

    def _qkv(self, attn: str, key: str) -> None:
        # for each KV head in turn: its Hq / M query heads, its key head, its value head
        model, table = self.model, self.table
        dim, groups = model.head_dim, model.num_kv_heads
        rows = {"q": model.num_heads // groups * dim, "k": dim, "v": dim}
        for name, per_group in rows.items():
            table.hf_shapes[f"{attn}{name}_proj.weight"] = (groups * per_group, model.hidden_size)
        table.shapes[f"{key}.weight"] = (groups * sum(rows.values()), model.hidden_size)
        table.objects[key] = 0
        key_row = 0
        for group in range(groups):
            for name, per_group in rows.items():
                table.spans.append(
                    Span(f"{attn}{name}_proj.weight", group * per_group, f"{key}.weight", key_row, per_group)
                )
                key_row += per_group

    def index_branch(self, dim: int) -> None:
        """Add the index branch: [M * dim, H] queries, [dim, H] key, a norm of each."""
        attn, ours = f"{self.name}self_attn.{self.naming.index}", f"{self.key}self_attention.index_branch."
        hidden, groups = self.model.hidden_size, self.model.num_kv_heads
        self.table.add(f"{attn}q_proj.weight", f"{ours}linear_q.weight", (groups * dim, hidden))
        self.table.add(f"{attn}k_proj.weight", f"{ours}linear_k.weight", (dim, hidden))
        self.table.add(f"{attn}q_norm.weight", f"{ours}q_norm.weight", (dim,))
        self.table.add(f"{attn}k_norm.weight", f"{ours}k_norm.weight", (dim,))

    def gated(self, name: str, key: str, width: int) -> None:
        """Add a dense or shared feed-forward network below `name` and `key`: gate rows, then up rows."""
        theirs, ours, hidden = f"{self.name}{name}", f"{self.key}{key}", self.model.hidden_size
        if self.naming.fused_gate_up:
            self.table.add(f"{theirs}gate_up_proj.weight", f"{ours}linear_fc1.weight", (2 * width, hidden))
        else:
            self.table.shapes[f"{ours}linear_fc1.weight"] = (2 * width, hidden)
            # Megatron's gated layers split fc1's output in two halves: gate first
            for part, half in enumerate(("gate_proj", "up_proj")):
                self._rows(
                    f"{theirs}{half}.weight", (width, hidden), f"{ours}linear_fc1.weight", part * width
                )
        self.table.add(f"{theirs}down_proj.weight", f"{ours}linear_fc2.weight", (hidden, width))
        self.table.objects |= {f"{ours}linear_fc1": 0, f"{ours}linear_fc2": 0}

    def experts(self) -> None:
        """Add router, routed experts and, if there is one, the shared expert."""
        model, moe = self.model, f"{self.name}{self.naming.moe}."
        count, hidden, width = model.num_experts, model.hidden_size, model.moe_ffn_hidden_size
        self.table.add(f"{moe}gate.weight", f"{self.key}mlp.router.weight", (count, hidden))
        self.table.add(f"{moe}{self.naming.bias}", f"{self.key}mlp.router.expert_bias", (count,))
        fc1, fc2 = f"{self.key}mlp.experts.experts.linear_fc1", f"{self.key}mlp.experts.experts.linear_fc2"
        if self.naming.fused_experts:
            self.table.add(f"{moe}experts.gate_up_proj", f"{fc1}.weight", (count, 2 * width, hidden))
            self.table.add(f"{moe}experts.down_proj", f"{fc2}.weight", (count, hidden, width))
        else:
            self.table.shapes[f"{fc1}.weight"] = (count, 2 * width, hidden)
            self.table.shapes[f"{fc2}.weight"] = (count, hidden, width)
            # expert e of fc1 has 2 W rows, W = width: w1 (gate) from 2 e W on, w3 (up) from (2 e + 1) W on
            for expert in range(count):
                one = f"{moe}experts.{expert}."
                self._rows(f"{one}w1.weight", (width, hidden), f"{fc1}.weight", 2 * expert * width)
                self._rows(f"{one}w3.weight", (width, hidden), f"{fc1}.weight", (2 * expert + 1) * width)
                self._rows(f"{one}w2.weight", (hidden, width), f"{fc2}.weight", expert * hidden)
        self.table.objects |= {fc1: count, fc2: count}
        if model.shared_expert_hidden_size:
            self.gated(
                f"{self.naming.moe}.shared_experts.", "mlp.shared_experts.", model.shared_expert_hidden_size
            )

    def _rows(self, name: str, shape: tuple[int, int], key: str, key_row: int) -> None:
        """Add a whole tensor of theirs that is some rows of ours."""
        self.table.hf_shapes[name] = shape
        self.table.spans.append(Span(name, 0, key, key_row, shape[0]))
