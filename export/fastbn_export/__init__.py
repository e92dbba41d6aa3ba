"""fastbn_export: make batch normalization disappear from an ONNX model, and prove it."""
