"""Between pixels and latents: autoencoders fitted here, and published ones."""
