"""Cut the layers of a model into pipeline stages: prices of layers, the best cut, and what a run asks for.

Standard library only, so that rules, `--check`, planners and the model agree on one layout.
"""

from msa_train.config.pipeline.layout import PipelineLayout, describe_layout, resolve_layout
from msa_train.config.pipeline.partition import best_layout, even_layout, rank_sums
from msa_train.config.pipeline.prices import LayerRates, Prices, layer_prices, price_layers
from msa_train.config.pipeline.state_bytes import layer_bytes

__all__ = [
    "LayerRates",
    "PipelineLayout",
    "Prices",
    "best_layout",
    "describe_layout",
    "even_layout",
    "layer_bytes",
    "layer_prices",
    "price_layers",
    "rank_sums",
    "resolve_layout",
]
