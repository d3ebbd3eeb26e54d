"""How the embedded model is made: its text, its tokenizer, its training."""
