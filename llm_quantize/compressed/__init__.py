"Directories in the compressed-tensors format, for vLLM and transformers."
