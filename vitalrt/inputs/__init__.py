"""Files, arrays and questions -> what the model reads."""
