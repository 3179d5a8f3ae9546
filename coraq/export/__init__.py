"""What a run becomes for other tools: ONNX, a timm folder, torch.export; each opened and compared before it counts."""
