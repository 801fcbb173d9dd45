"A model as names, settings, tensors and layers, wherever it comes from."
