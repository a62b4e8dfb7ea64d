"""What can be read from a request's latents, by the scaffolding that supervised them in training."""
