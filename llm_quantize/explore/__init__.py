"Look around in a model with the mouse."
