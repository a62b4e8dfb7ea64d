"""Ways of training a latent reasoner, on one backbone and one data path."""
