"""How a language model's output layer is trained. List these files after a model's."""
