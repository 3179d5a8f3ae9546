"""Pure numerics: tensors in, tensors out. Imports torch and nothing else of coraq."""
