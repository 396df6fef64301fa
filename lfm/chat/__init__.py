"""Text to tokens and back: tokenizer, prompt building, detokenizer, stop strings, sampling defaults. No torch."""
