"What a text shows about a model."
