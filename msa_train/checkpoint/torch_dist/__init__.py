"""Write Megatron's torch_dist files in the background; read them without executing anything."""
