"""Released models in and out: Hugging Face folders and our checkpoints."""
