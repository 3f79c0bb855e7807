"""Dense attention in parts that are merged by log-sum-exp."""
