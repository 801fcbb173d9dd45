"Decide, encode and write a GGUF file."
