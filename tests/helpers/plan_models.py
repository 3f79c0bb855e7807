"""A model that is small enough for a search to take seconds."""

SMALL_MODEL = (
    *("model=m3", "model.num_layers=8", "model.hidden_size=2048", "model.num_heads=16"),
    *("model.num_experts=16", "model.moe_ffn_hidden_size=1024", "model.shared_expert_hidden_size=1024"),
    *("model.ffn_hidden_size=4096", "model.vocab_size=32000", "model.num_dense_ffn_layers=1"),
    *("model.layer_attention=full,msa",),
)
