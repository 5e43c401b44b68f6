"""Small readable models, real weights and real text for the demonstrations of lora_jax.

Nothing here is part of the library's interface: the models are ordinary Flax modules that know nothing of
adapters, which is the point. Their parameter names are those of the Hugging Face models they mirror.
"""
