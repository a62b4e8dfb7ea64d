"""The life of a request: admission, prefill, latent steps, answer steps."""
