"""Parts of engine=deepspeed. DeepSpeed is imported when the engine is built, and by no other engine."""
