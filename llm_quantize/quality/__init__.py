"What quantization cost."
