"""The shape of these tests' models."""

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
SHAPE |= {"vocab_size": 64}
