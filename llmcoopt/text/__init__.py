"""Text <-> ids: the parts behind llmcoopt.Tokenizer.

`folder.py` and `gguf_vocab.py` read files, `rust.py` and `sentencepiece.py` are the two kinds of encoder, `detokenizer.py` is the way back."""
