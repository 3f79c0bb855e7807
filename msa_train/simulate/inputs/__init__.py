"""What a study is given: cluster, rates, layer shape, layouts."""
