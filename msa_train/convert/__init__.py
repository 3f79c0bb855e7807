"""Convert released models: Hugging Face folders to our checkpoints and back."""
