"""Parts of engine=deepspeed."""
