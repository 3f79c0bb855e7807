"""The rotary embedding (RoPE) that a model or a stage has, and the rules about its settings."""
