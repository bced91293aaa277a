"""What the commands of `keye-kernels` do, one module or package per command."""
