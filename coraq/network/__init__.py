"""timm networks: loading, folding BatchNorm, observed dataflow, layers as matrices, blocks."""
