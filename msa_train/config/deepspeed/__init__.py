"""Settings of engine=deepspeed, their rules, and DeepSpeed's own JSON made of them."""
