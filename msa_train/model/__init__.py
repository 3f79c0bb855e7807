"""Build and run the model: Megatron-core's GPTModel with MSA attention, our router, dispatcher and layers.

The only package that names Megatron's layer classes. Every class is a subclass or a spec entry; nothing of
torch or Megatron is assigned into.
"""
