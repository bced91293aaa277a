"""Keye in transformers and vLLM, and this package's operators in models of other families."""
