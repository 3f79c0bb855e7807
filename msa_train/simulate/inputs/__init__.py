"""Hold what a study is given: cluster, rates, layer shape, layouts."""
