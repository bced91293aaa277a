"""The commands of `keye-kernels`, one module or folder each."""
