"""A trained model becomes a bundle: three ONNX graphs, one weight file and a manifest."""
