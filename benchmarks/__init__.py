"""What the bundled model is worth and what it costs; every figure in the documents comes from here."""
