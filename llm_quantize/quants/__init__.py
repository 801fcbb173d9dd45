"Tensors to bytes and back; knows no model."
