"""Hide model, optimizer and gradient reduction behind one interface: `engine`, by PyTorch or by Megatron."""
