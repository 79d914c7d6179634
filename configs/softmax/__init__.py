"""How the output layer of a language model is trained. List these files after a model's."""
