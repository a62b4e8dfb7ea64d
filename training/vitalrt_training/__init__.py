"""How the models that vitalrt runs are made: data, losses, training runs, evaluation."""
